/** What all parts of a run know of it. */
import type { Mistral } from '@lorikeet/mistral';
import type { Device } from '@lorikeet/tensor';
import { fingerprint, type StepRecord, type TrainingArguments } from '@lorikeet/trainer';
import { baseIdentity, type CheckpointFolder, type ResumePoint } from '../checkpoint.js';
import type { Config } from '../config.js';
import type { CommandContext } from '../context.js';
import type { Plan } from '../plan.js';
import type { RunData } from '../run-data.js';
import type { ModelFiles } from '../session.js';
import { trainingArguments } from '../training-arguments.js';

/** A run whose files and data have been read. */
export interface PreparedRun {
  readonly config: Config;
  readonly files: ModelFiles;
  readonly data: RunData;
  /** The checkpoint to go on from. */
  readonly from?: ResumePoint | undefined;
  /** How often its device was lost before. */
  readonly deviceLosses?: number | undefined;
  /** True after a loss in this process: what was shown of the run is still there. */
  readonly again?: boolean | undefined;
  /** Hears of each checkpoint that is written. */
  readonly onCheckpoint?: ((checkpoint: CheckpointFolder) => void) | undefined;
}

/** Loss and token accuracy on the held-out rows. */
export interface Evaluation {
  readonly loss: number;
  readonly tokenAccuracy: number;
  readonly supervisedTokens: number;
}

/** How far a run has got. */
export type Progressed = Pick<StepRecord, 'step' | 'skippedSteps' | 'peakBytes' | 'seconds'>;

/** A run on a device: begun, or gone on with. */
export class RunFrame {
  readonly context: CommandContext;
  readonly config: Config;
  readonly files: ModelFiles;
  readonly data: RunData;
  readonly from: ResumePoint | undefined;
  readonly deviceLosses: number;
  readonly again: boolean;
  readonly onCheckpoint: PreparedRun['onCheckpoint'];
  readonly device: Device;
  readonly plan: Plan;
  readonly args: TrainingArguments;
  /** Steps of the whole run. */
  readonly total: number;
  /** When the run was first begun. */
  readonly started: string;
  readonly #begun = new Date();
  #base: string | undefined;
  #hashes: { readonly train: string; readonly validation: string | null } | undefined;

  constructor(context: CommandContext, run: PreparedRun, { device, plan }: { device: Device; plan: Plan }) {
    const { config, files, data, from, deviceLosses = 0 } = run;
    this.context = context;
    this.config = config;
    this.files = files;
    this.data = data;
    this.from = from;
    this.deviceLosses = deviceLosses;
    this.again = run.again === true;
    this.onCheckpoint = run.onCheckpoint;
    this.device = device;
    this.plan = plan;
    const { args, total } = trainingArguments(config, data.sequences.length);
    this.args = args;
    this.total = total;
    this.started = from?.progress.started ?? this.#begun.toISOString();
  }

  /** Identity of the base model, for checkpoints. */
  async base(): Promise<string> {
    this.#base ??= this.from?.progress.base ?? (await baseIdentity(this.files.folder));
    return this.#base;
  }

  /** Identity of the data, for checkpoints. */
  dataHashes(): { readonly train: string; readonly validation: string | null } {
    const { train: trained, validation } = this.data;
    this.#hashes ??= {
      train: fingerprint(trained.examples),
      validation: validation === undefined ? null : fingerprint(validation.examples),
    };
    return this.#hashes;
  }

  /** Seconds since the run was first begun, without the time in which it lay still. */
  wallSeconds(): number {
    return (this.from?.progress.wall_seconds ?? 0) + (Date.now() - this.#begun.getTime()) / 1000;
  }

  /** Steps at which the run was gone on with. */
  resumed(): number[] {
    return this.from === undefined ? [] : [...this.from.progress.resumed, this.from.step];
  }
}

/** The element type of a model as run files name it. */
export function dtypeName(model: Mistral): 'float32' | 'float16' {
  return model.dtype === 'f32' ? 'float32' : 'float16';
}
