/** Supervised fine-tuning in the shape that users of trl know; all the work is done by `train`. */
import type { CalibrationBatch, CausalLM } from '@lorikeet/nn';
import {
  type ByteFolder,
  encodeFloats,
  FormatError,
  isJsonArray,
  isJsonObject,
  type JsonObject,
  type JsonValue,
  LorikeetError,
  openCheckpoint,
  scope,
  type SinkFolder,
  type Tensor,
  writeCheckpoint,
} from '@lorikeet/tensor';
import { scheduleOptions, type SFTConfig, stepCount, totalSteps, validateSFTConfig } from './arguments.js';
import { calibrationBatches } from './calibration.js';
import { readTrainerState } from './checkpoint.js';
import { checkExamples, type CollateOptions, type DataCollator, type DataRow, type TokenizedExample } from './data.js';
import { checkEvaluations } from './evaluation-watch.js';
import { packExamples } from './packing.js';
import { scheduleWarnings } from './schedule.js';
import { type TextTokenizer, tokenizeExamples } from './sft.js';
import { type PromptTemplate, resolveTemplate } from './template.js';
import { type CheckpointRecord, evaluateLoss, train, type TrainRecord, type TrainResult } from './train.js';

/** What is trained in place of the model's own parameters. */
export interface TrainableAdapter {
  /** f32 tensors by the names under which they are saved. */
  parameters(): Iterable<readonly [name: string, parameter: Tensor]>;
  /** Writes the adapter's files; with `resumable` all that `load` needs, where the files themselves do not say it. */
  save(folder: SinkFolder, options?: { readonly resumable?: boolean }): Promise<void>;
  /** Takes the values of files that `save` wrote; without it a run cannot go on from a checkpoint. */
  load?(folder: ByteFolder): Promise<void>;
}

/** A way to make a model trainable in few parameters. */
export interface PeftConfig {
  /** Puts the adapter into the model; on an error the model is as it was. */
  inject(model: CausalLM): TrainableAdapter;
  /** True where the adapter's start is computed from the model's weights, which takes `create`. */
  readonly readsWeights?: boolean;
  /** `inject` for such an adapter. The data are training rows, for starts that look at the inputs of layers. */
  create?(model: CausalLM, data: readonly CalibrationBatch[]): Promise<TrainableAdapter>;
}

/**
 * Rows as {@link DataRow}s (whose place errors name), as plain objects with the fields of the template, or tokenised
 * already; not mixed.
 */
export type SFTDataset = readonly (DataRow | TokenizedExample | object)[];

/** What an `SFTTrainer` is made of. */
export interface SFTTrainerOptions {
  readonly model: CausalLM;
  readonly args?: SFTConfig;
  readonly train_dataset: SFTDataset;
  readonly eval_dataset?: SFTDataset | undefined;
  /** The tokenizer; needed unless the data sets are tokenised. */
  readonly processing_class?: TextTokenizer | undefined;
  /**
   * Injected when the trainer is made, or, where it `readsWeights`, by the first call that needs it. Without it all parameters of the model are trained. An adapter that the model has
   * already is trained with `{ inject: () => adapter }`.
   */
  readonly peft_config?: PeftConfig | undefined;
  /** How examples become a batch; by default padded on the right with the tokenizer's padding token. */
  readonly data_collator?: CollateOptions | DataCollator | undefined;
  /** A template, the name of one, or a text with placeholders; by default the fields of the first row decide. */
  readonly template?: PromptTemplate | string | undefined;
}

/** An entry of the log about the steps since the last one. */
export interface TrainLog {
  readonly step: number;
  readonly epoch: number;
  /** Mean of the steps' losses, not finite where one of them was not. */
  readonly loss: number;
  /** Of the last step, before clipping. */
  readonly grad_norm: number;
  /** That the last step used. */
  readonly learning_rate: number;
  readonly mean_token_accuracy: number;
  /** Real tokens since the run began, prompts included. */
  readonly num_tokens: number;
}

/** An entry of the log about an evaluation between steps. */
export interface EvalLog {
  readonly step: number;
  readonly epoch: number;
  /** Mean over all supervised tokens of the set. */
  readonly eval_loss: number;
  readonly eval_mean_token_accuracy: number;
}

/** Where a run stands. */
export interface SFTTrainerState {
  /** Optimizer steps done, skipped ones included. */
  readonly global_step: number;
  readonly max_steps: number;
  readonly epoch: number;
  readonly log_history: readonly (TrainLog | EvalLog)[];
}

/** What `SFTTrainer.steps` and `train` take. */
export interface SFTStepOptions {
  /** Goes on from the checkpoint in this folder, which `saveCheckpoint` wrote in a run of the same settings and data. */
  readonly resume_from_checkpoint?: ByteFolder | undefined;
  /** Stops cleanly after the steps that were begun. */
  readonly signal?: AbortSignal | undefined;
  /** Called during evaluations with the rows done so far and all rows. */
  readonly onEvalProgress?: ((rows: number, total: number) => void) | undefined;
}

/** What `SFTTrainer.train` takes. */
export interface SFTTrainOptions extends SFTStepOptions {
  /** Hears of every step and evaluation. */
  readonly onRecord?: ((record: TrainRecord) => void) | undefined;
  /**
   * Called every `save_steps`, and with `save_on_interrupt` when the signal ends the run; training waits for it. Give the
   * record to `saveCheckpoint`.
   */
  readonly onCheckpoint?: ((checkpoint: CheckpointRecord) => Promise<void>) | undefined;
  /** Opens the checkpoint of a step, which `saveCheckpoint` wrote; needed with `load_best_model_at_end`. */
  readonly openCheckpoint?: ((step: number) => ByteFolder | Promise<ByteFolder>) | undefined;
  /** Hears of every entry of the log, of which there is one in `logging_steps` steps, one after the last, one an evaluation. */
  readonly onLog?: ((entry: TrainLog | EvalLog) => void) | undefined;
}

/** What `SFTTrainer.train` gives. */
export interface TrainOutput {
  /** Optimizer steps done, skipped ones included. */
  readonly global_step: number;
  /** Mean loss of the steps of this call; not finite where one of them was not. */
  readonly training_loss: number;
  /** True when the signal ended the run early. */
  readonly aborted: boolean;
  /** Step of the checkpoint whose evaluation was the best; undefined where none was evaluated. */
  readonly best_global_step: number | undefined;
  /** Steps that changed nothing because a gradient was not finite. */
  readonly skipped_steps: number;
  readonly metrics: {
    readonly train_runtime: number;
    readonly train_samples_per_second: number;
    readonly train_steps_per_second: number;
    readonly train_loss: number;
  };
}

/** What `SFTTrainer.evaluate` gives. */
export interface EvalMetrics {
  /** Mean over all supervised tokens of the set. */
  readonly eval_loss: number;
  readonly eval_mean_token_accuracy: number;
  readonly eval_supervised_tokens: number;
  readonly eval_runtime: number;
  readonly eval_samples_per_second: number;
  readonly epoch: number;
}

function isTokenized(item: object): item is TokenizedExample {
  return 'ids' in item && item.ids instanceof Int32Array && 'labels' in item && item.labels instanceof Int32Array;
}

function isDataRow(item: object): item is DataRow {
  return 'fields' in item && typeof item.fields === 'object' && item.fields !== null && !Array.isArray(item.fields);
}

/** `max_length` where it is left out. */
const standardLength = 1024;

/** What `train` is told to return when a run is broken off; nobody reads it. */
const brokenOff: TrainResult = {
  steps: 0,
  totalSteps: 0,
  skippedSteps: 0,
  aborted: true,
  stoppedEarly: false,
  bestStep: undefined,
};

/** A step as far as the next entry of the log needs it. */
interface Unlogged {
  readonly loss: number;
  readonly tokenAccuracy: number;
}

/** JSON has no NaN and makes null of it. */
const numberOr = (value: JsonValue | undefined): number => (typeof value === 'number' ? value : Number.NaN);

const fieldsOf = (value: JsonValue | undefined): JsonObject => (isJsonObject(value) ? value : {});

/** An entry of a log that was written as JSON. */
function logEntry(value: JsonValue): TrainLog | EvalLog {
  const fields = fieldsOf(value);
  const at = (name: string): number => numberOr(fields[name]);
  const [step, epoch] = [at('step'), at('epoch')];
  if (Object.hasOwn(fields, 'eval_loss')) {
    return { step, epoch, eval_loss: at('eval_loss'), eval_mean_token_accuracy: at('eval_mean_token_accuracy') };
  }
  return {
    step,
    epoch,
    loss: at('loss'),
    grad_norm: at('grad_norm'),
    learning_rate: at('learning_rate'),
    mean_token_accuracy: at('mean_token_accuracy'),
    num_tokens: at('num_tokens'),
  };
}

const mean = (values: readonly number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length;

/**
 * Fine-tunes a model on prompts and completions.
 *
 * @example
 * ```ts
 * const trainer = new SFTTrainer({
 *   model,
 *   args: { learning_rate: 2e-4, num_train_epochs: 2, max_length: 512, eval_steps: 50 },
 *   train_dataset: [
 *     { instruction: 'What is the sentiment?', input: 'Profits fell.', output: 'negative' },
 *     { instruction: 'What is the sentiment?', input: 'Sales doubled.', output: 'positive' },
 *   ],
 *   eval_dataset,
 *   processing_class: tokenizer,
 *   peft_config: peftConfig({ r: 16, lora_alpha: 32, target_modules: ['q_proj', 'v_proj'] }),
 * });
 * await trainer.train({ onLog: (entry) => console.log(entry) });
 * console.log(await trainer.evaluate());
 * await trainer.saveModel(folder);
 * ```
 */
export class SFTTrainer {
  readonly model: CausalLM;
  readonly args: SFTConfig;
  /** Tokenised; with `packing` several rows to an example. */
  readonly train_dataset: readonly TokenizedExample[];
  readonly eval_dataset: readonly TokenizedExample[] | undefined;
  /** What the user should be told of the data and the schedule before the first step. */
  readonly warnings: readonly string[];
  readonly #options: SFTTrainerOptions;
  readonly #collate: CollateOptions | DataCollator;
  #adapter: TrainableAdapter | undefined;
  /** The adapter that is being made. */
  #creating: Promise<TrainableAdapter> | undefined;
  #template: PromptTemplate | undefined;
  #state: SFTTrainerState;
  #sinceLog: Unlogged[] = [];
  #tokens = 0;
  #result: TrainResult = brokenOff;

  /**
   * Tokenises the data sets and injects the adapter, in that order: when something is wrong the model is as it was.
   *
   * @throws RangeError that names every wrong value of `args`; DataError that names every bad row; LorikeetError when
   * something is missing, or parameters to be trained are not f32
   */
  constructor(options: SFTTrainerOptions) {
    const { model, args = {}, processing_class: tokenizer, data_collator, peft_config } = options;
    validateSFTConfig(args);
    if (options.eval_dataset === undefined && ((args.eval_steps ?? 0) > 0 || args.eval_on_start === true)) {
      throw new LorikeetError(
        'SFTTrainer: eval_steps or eval_on_start asks for evaluations, but there is no eval_dataset',
      );
    }
    this.#options = options;
    this.model = model;
    this.args = args;
    const warnings: string[] = [];
    const rows = this.#tokenize(options.train_dataset, 'train_dataset', warnings);
    this.train_dataset = args.packing === true ? packExamples(rows, args.max_length ?? standardLength) : rows;
    if (options.eval_dataset !== undefined) {
      this.eval_dataset = this.#tokenize(options.eval_dataset, 'eval_dataset', warnings);
    }
    const total = totalSteps(this.train_dataset.length, args).total;
    const evalEvery = this.eval_dataset === undefined ? 0 : stepCount(args.eval_steps ?? 0, total);
    checkEvaluations(args, evalEvery, stepCount(args.save_steps ?? 0, total));
    warnings.push(...scheduleWarnings(scheduleOptions(args, total)));
    this.warnings = warnings;
    this.#collate = data_collator ?? {
      padTokenId: tokenizer?.padTokenId ?? tokenizer?.eosTokenId,
      padToMultipleOf: args.pad_to_multiple_of,
    };
    this.#state = { global_step: 0, max_steps: total, epoch: 0, log_history: [] };
    if (peft_config === undefined) {
      const [first] = [...model.namedParameters()].filter(([, p]) => p.dtype !== 'f32');
      if (first !== undefined) {
        throw new LorikeetError(
          `SFTTrainer: ${first[0]} is ${first[1].dtype}; without peft_config all parameters are trained and must be f32: load the weights as f32, or give a peft_config`,
        );
      }
    } else if (peft_config.readsWeights !== true || peft_config.create === undefined) {
      this.#adapter = peft_config.inject(model);
    }
  }

  /**
   * The injected adapter; undefined when the model itself is trained. Where the start is computed from the weights, that is
   * done by the first call of `steps`, `train`, `evaluate` or `saveModel`, and the adapter is not there before.
   */
  get adapter(): TrainableAdapter | undefined {
    return this.#adapter;
  }

  /** The adapter, made now where it could not be when the trainer was. */
  async #ready(): Promise<TrainableAdapter | undefined> {
    const { model, peft_config } = this.#options;
    if (this.#adapter !== undefined || peft_config?.create === undefined) return this.#adapter;
    this.#creating ??= peft_config.create(
      model,
      calibrationBatches(model, this.train_dataset, {
        collate: this.#collate,
        batchSize: this.args.per_device_train_batch_size ?? 8,
      }),
    );
    try {
      this.#adapter = await this.#creating;
    } finally {
      // After an error the model is as it was, and the next call may try again.
      this.#creating = undefined;
    }
    return this.#adapter;
  }

  /** Where the run stands that was begun last. */
  get state(): SFTTrainerState {
    return this.#state;
  }

  #tokenize(dataset: SFTDataset, name: string, warnings: string[]): readonly TokenizedExample[] {
    const { args, model } = this;
    const { processing_class: tokenizer, template } = this.#options;
    const tokenized = dataset.filter(isTokenized);
    if (tokenized.length === dataset.length) {
      checkExamples(tokenized, model.vocabSize, name);
      return tokenized;
    }
    if (tokenized.length > 0) {
      throw new LorikeetError(
        `SFTTrainer: ${tokenized.length} of ${dataset.length} rows of ${name} are tokenised; all or none must be`,
      );
    }
    if (tokenizer === undefined) {
      throw new LorikeetError(
        `SFTTrainer: ${name} holds rows, so processing_class (the tokenizer) is needed; give it, or tokenise the rows`,
      );
    }
    const rows = dataset.map((row) => (isDataRow(row) ? row : { fields: Object.fromEntries(Object.entries(row)) }));
    this.#template ??=
      typeof template === 'object'
        ? template
        : resolveTemplate({ promptTemplate: template, columns: Object.keys(rows[0].fields) });
    const { examples, report } = tokenizeExamples(rows, {
      tokenizer,
      template: this.#template,
      maxLength: args.max_length === null ? undefined : (args.max_length ?? standardLength),
      overlong: args.overlong,
      completionOnlyLoss: args.completion_only_loss,
    });
    checkExamples(examples, model.vocabSize, name);
    warnings.push(...report.warnings.map((warning) => `${name}: ${warning}`));
    return examples;
  }

  /** Takes the values of the weights beside a checkpoint, and the log up to it. */
  async #resume(folder: ByteFolder): Promise<void> {
    const { global_step, epoch, caller } = await readTrainerState(folder);
    const { log_history, since_log, num_tokens } = fieldsOf(caller);
    if (!isJsonArray(log_history) || !isJsonArray(since_log) || typeof num_tokens !== 'number') {
      throw new FormatError(`${folder.name}: this checkpoint was not written by SFTTrainer.saveCheckpoint`);
    }
    await this.#loadValues(folder);
    this.#state = { ...this.#state, global_step, epoch, log_history: log_history.map(logEntry) };
    this.#sinceLog = since_log.map((value) => ({
      loss: numberOr(fieldsOf(value)['loss']),
      tokenAccuracy: numberOr(fieldsOf(value)['tokenAccuracy']),
    }));
    this.#tokens = num_tokens;
  }

  /** Takes the values of what is trained from a checkpoint. */
  async #loadValues(folder: ByteFolder): Promise<void> {
    const adapter = this.#adapter;
    if (adapter === undefined) await this.#loadWeights(folder);
    else if (adapter.load === undefined) {
      throw new LorikeetError('SFTTrainer: this adapter has no `load`, so its checkpoints cannot be read');
    } else await adapter.load(folder);
  }

  async #loadWeights(folder: ByteFolder): Promise<void> {
    const file = await openCheckpoint(folder);
    try {
      const parameters = [...this.model.namedParameters()];
      const wrong = parameters.filter(([name, { shape }]) => file.tensors.get(name)?.shape.join() !== shape.join());
      if (wrong.length > 0) {
        throw new FormatError(
          `${file.name}: ${wrong.length} parameters of the model are missing or of another shape, ${wrong[0][0]} first`,
        );
      }
      for (const [name, parameter] of parameters) {
        const values = await file.readFloats(name);
        const { device, shape } = parameter;
        scope(() => device.copy(device.fromArray(values, shape), parameter));
      }
    } finally {
      await file.close();
    }
  }

  /**
   * Trains from the parameters as they are now, or from a checkpoint; a record per step, evaluation and checkpoint. What
   * `train` below runs through.
   * @throws FormatError for a broken checkpoint, LorikeetError for one of another run
   */
  async *steps(options: SFTStepOptions = {}): AsyncGenerator<TrainRecord, TrainResult, undefined> {
    this.#state = { global_step: 0, max_steps: this.#state.max_steps, epoch: 0, log_history: [] };
    this.#sinceLog = [];
    this.#tokens = 0;
    const adapter = await this.#ready();
    if (options.resume_from_checkpoint !== undefined) await this.#resume(options.resume_from_checkpoint);
    const run = train({
      model: this.model,
      parameters: adapter?.parameters() ?? this.model.namedParameters(),
      args: this.args,
      trainDataset: this.train_dataset,
      evalDataset: this.eval_dataset,
      collate: this.#collate,
      resume: options.resume_from_checkpoint,
      signal: options.signal,
      onEvalProgress: options.onEvalProgress,
    });
    try {
      for (;;) {
        const next = await run.next();
        if (next.done === true) {
          this.#result = next.value;
          return next.value;
        }
        this.#note(next.value);
        yield next.value;
      }
    } finally {
      await run.return(brokenOff);
    }
  }

  #note(record: TrainRecord): void {
    const { step, epoch } = record;
    const log = (entry: TrainLog | EvalLog): void => {
      this.#state = { ...this.#state, log_history: [...this.#state.log_history, entry] };
    };
    if (record.kind === 'eval') {
      log({ step, epoch, eval_loss: record.loss, eval_mean_token_accuracy: record.tokenAccuracy });
      return;
    }
    if (record.kind === 'checkpoint') return;
    this.#state = { ...this.#state, global_step: step, epoch };
    this.#sinceLog.push({ loss: record.loss, tokenAccuracy: record.tokenAccuracy });
    this.#tokens += record.tokens;
    const every = stepCount(this.args.logging_steps ?? 10, record.totalSteps);
    const first = step === 1 && this.args.logging_first_step === true;
    if (every === 0 || (step % every !== 0 && step !== record.totalSteps && !first)) return;
    log({
      step,
      epoch,
      loss: mean(this.#sinceLog.map(({ loss }) => loss)),
      grad_norm: record.gradNorm,
      learning_rate: record.learningRate,
      mean_token_accuracy: mean(this.#sinceLog.map(({ tokenAccuracy }) => tokenAccuracy)),
      num_tokens: this.#tokens,
    });
    this.#sinceLog = [];
  }

  /**
   * Trains to the end, or until the signal. With `load_best_model_at_end` the parameters then have the values of the best
   * checkpoint, unless the signal ended the run.
   */
  async train(options: SFTTrainOptions = {}): Promise<TrainOutput> {
    const began = performance.now();
    const openBest = this.args.load_best_model_at_end === true ? options.openCheckpoint : undefined;
    if (this.args.load_best_model_at_end === true && (openBest === undefined || options.onCheckpoint === undefined)) {
      throw new LorikeetError(
        'SFTTrainer.train: load_best_model_at_end needs onCheckpoint, which keeps checkpoints, and openCheckpoint, which opens one again',
      );
    }
    const { per_device_train_batch_size: batch = 8, gradient_accumulation_steps: accumulation = 1 } = this.args;
    const losses: number[] = [];
    let logged = 0;
    if (options.resume_from_checkpoint !== undefined) {
      // Entries that another run has told of already.
      const { caller } = await readTrainerState(options.resume_from_checkpoint);
      const { log_history = [] } = fieldsOf(caller);
      if (isJsonArray(log_history)) logged = log_history.length;
    }
    for await (const record of this.steps(options)) {
      if (record.kind === 'step') losses.push(record.loss);
      options.onRecord?.(record);
      if (record.kind === 'checkpoint') await options.onCheckpoint?.(record);
      for (; logged < this.#state.log_history.length; logged++) options.onLog?.(this.#state.log_history[logged]);
    }
    const { bestStep } = this.#result;
    if (openBest !== undefined && bestStep !== undefined && !this.#result.aborted) {
      await this.#loadValues(await openBest(bestStep));
    }
    const seconds = (performance.now() - began) / 1000;
    const training_loss = mean(losses);
    return {
      global_step: this.#result.steps,
      training_loss,
      aborted: this.#result.aborted,
      best_global_step: bestStep,
      skipped_steps: this.#result.skippedSteps,
      metrics: {
        train_runtime: seconds,
        train_samples_per_second: (losses.length * batch * accumulation) / seconds,
        train_steps_per_second: losses.length / seconds,
        train_loss: training_loss,
      },
    };
  }

  /**
   * Loss and accuracy over the evaluation set, or over another one.
   * @throws the signal's reason when `signal` is aborted
   */
  async evaluate(
    options: {
      readonly dataset?: SFTDataset | undefined;
      readonly signal?: AbortSignal | undefined;
      readonly onProgress?: ((rows: number, total: number) => void) | undefined;
    } = {},
  ): Promise<EvalMetrics> {
    const dataset = options.dataset === undefined ? this.eval_dataset : this.#tokenize(options.dataset, 'dataset', []);
    if (dataset === undefined) {
      throw new LorikeetError('SFTTrainer.evaluate: there is no eval_dataset; give one here or to the constructor');
    }
    await this.#ready();
    const began = performance.now();
    const result = await evaluateLoss(this.model, dataset, {
      batchSize: this.args.per_device_eval_batch_size ?? 8,
      collate: this.#collate,
      onProgress: options.onProgress,
      signal: options.signal,
    });
    const seconds = (performance.now() - began) / 1000;
    return {
      eval_loss: result.loss,
      eval_mean_token_accuracy: result.tokenAccuracy,
      eval_supervised_tokens: result.supervisedTokens,
      eval_runtime: seconds,
      eval_samples_per_second: dataset.length / seconds,
      epoch: this.#state.epoch,
    };
  }

  /**
   * Writes a checkpoint into a folder of its own: what `saveModel` writes, the optimizer's state and where the run stands.
   * @param record the record of the checkpoint, before the next one is asked for
   */
  async saveCheckpoint(record: CheckpointRecord, folder: SinkFolder): Promise<void> {
    await this.#save(folder, true);
    const log_history = this.#state.log_history.map((entry): JsonObject => ({ ...entry }));
    const since_log = this.#sinceLog.map((step): JsonObject => ({ ...step }));
    await record.write(folder, { log_history, since_log, num_tokens: this.#tokens });
  }

  /**
   * Writes what was trained: the adapter's files, or all weights of the model in f32 as `model.safetensors` (the model's
   * config and the tokenizer's files are not the trainer's to write).
   */
  saveModel(folder: SinkFolder): Promise<void> {
    return this.#save(folder, false);
  }

  async #save(folder: SinkFolder, resumable: boolean): Promise<void> {
    const adapter = await this.#ready();
    if (adapter !== undefined) {
      await adapter.save(folder, { resumable });
      return;
    }
    await writeCheckpoint(
      folder,
      Array.from(this.model.namedParameters(), ([name, parameter]) => ({
        name,
        dtype: 'F32',
        shape: parameter.shape,
        data: async () => encodeFloats(Float32Array.from(await parameter.read()), 'F32').bytes,
      })),
    );
  }
}
