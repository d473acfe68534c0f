/**
 * What a run must keep, beside the parameters, to go on to the same bits: `optimizer.safetensors` (moments by parameter,
 * loss scale, good steps) and `trainer_state.json` (where the run stands, and what it may not differ in). Randomness is
 * counted, not drawn, so that seed and step are all there is of it. Nothing here knows a file system.
 */
import {
  type ByteFolder,
  type ByteSink,
  FormatError,
  formatJson,
  isJsonObject,
  JsonFields,
  type JsonObject,
  type JsonValue,
  LorikeetError,
  openSafetensors,
  parseJsonObject,
  type SinkFolder,
  type Tensor,
  type TensorEntry,
  type TensorFile,
  writeSafetensors,
} from '@lorikeet/tensor';
import type { SamplerState } from './sampler.js';
import type { WatchState } from './evaluation-watch.js';

/** File of the optimizer's state in a checkpoint's folder. */
export const optimizerFile = 'optimizer.safetensors';
/** File that says where a run stood, in a checkpoint's folder. */
export const trainerStateFile = 'trainer_state.json';

const formatVersion = 2;

/** Where a run stood: the content of trainer_state.json. */
export interface TrainerState {
  /** Optimizer steps done, skipped ones included. */
  readonly global_step: number;
  readonly max_steps: number;
  readonly epoch: number;
  /** Micro-steps done, which number the masks of dropout. */
  readonly micro_step: number;
  readonly skipped_steps: number;
  readonly sampler: SamplerState;
  /** Best evaluation (of `metric_for_best_model`) at a step that has a checkpoint; null before there is one. */
  readonly best_metric: number | null;
  readonly best_global_step: number | null;
  /** What all evaluations have decided. */
  readonly evaluations: WatchState;
  /** True when the evaluation of this step was given up and is to be made first. */
  readonly evaluation_due: boolean;
  /** Seconds of training so far. */
  readonly seconds: number;
  readonly peak_memory_bytes: number;
  /** {@link parametersHash} of the parameters, which lie in files of their own. */
  readonly parameters_hash: string;
  /** What decides the bits of a run, by name; a run that goes on must have the same. */
  readonly fixed: JsonObject;
  /** What the caller of `train` keeps. */
  readonly caller: JsonValue;
}

/** A checkpoint that was opened. */
export interface OpenCheckpoint {
  readonly state: TrainerState;
  readonly optimizer: TensorFile;
}

const hex = (word: number): string => (word >>> 0).toString(16).padStart(8, '0');

/** Fingerprint of names, shapes and values: equal for equal bits, 64 bits in hexadecimal. */
export async function parametersHash(
  parameters: Iterable<readonly [name: string, parameter: Tensor]>,
): Promise<string> {
  let a = 0x811c9dc5;
  let b = 0x9747b28c;
  const add = (word: number): void => {
    a = Math.imul(a ^ word, 0x01000193);
    // Multiplying carries upwards alone; the shift brings high bits down.
    a ^= a >>> 15;
    b = Math.imul(b ^ word ^ (b >>> 13), 0x5bd1e995);
  };
  for (const [name, parameter] of parameters) {
    for (const character of `${name} ${parameter.shape.join()} `) add(character.codePointAt(0) ?? 0);
    const values = Float32Array.from(await parameter.read());
    for (const word of new Uint32Array(values.buffer)) add(word);
  }
  return hex(a) + hex(b);
}

/**
 * Writes both files; trainer_state.json becomes visible last.
 * @param check called when all has been read from the device and nothing is visible yet; what it throws stops the writing
 */
export async function writeTrainerState(
  folder: SinkFolder,
  state: TrainerState,
  optimizer: readonly TensorEntry[],
  check: () => void,
): Promise<void> {
  const sinks: ByteSink[] = [];
  try {
    const tensors = await folder.create(optimizerFile);
    sinks.push(tensors);
    await writeSafetensors(tensors, optimizer);
    const text = await folder.create(trainerStateFile);
    sinks.push(text);
    await text.write(new TextEncoder().encode(`${JSON.stringify({ version: formatVersion, ...state }, null, 2)}\n`));
    check();
    for (const sink of sinks) await sink.close();
  } catch (error) {
    for (const sink of sinks) await sink.abort();
    throw error;
  }
}

async function readText(folder: ByteFolder, name: string): Promise<string> {
  const source = await folder.open(name);
  if (source === undefined) throw new FormatError(`${folder.name}: there is no ${name}, so this is no checkpoint`);
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(await source.read(0, source.size));
  } catch (error) {
    if (error instanceof TypeError) throw new FormatError(`${folder.name}: ${name} is not valid UTF-8`);
    throw error;
  } finally {
    await source.close?.();
  }
}

const stateKeys: readonly string[] = [
  'global_step',
  'max_steps',
  'epoch',
  'micro_step',
  'skipped_steps',
  'sampler',
  'best_metric',
  'best_global_step',
  'evaluations',
  'evaluation_due',
  'seconds',
  'peak_memory_bytes',
  'parameters_hash',
  'fixed',
  'caller',
];
const samplerKeys: readonly (keyof SamplerState)[] = [
  'seed',
  'length',
  'batchSize',
  'shuffle',
  'dropLast',
  'groupSize',
  'grouped',
  'epoch',
  'position',
];

function requireKeys(fields: JsonFields, keys: readonly string[]): void {
  const missing = keys.filter((key) => fields.raw(key) === undefined);
  if (missing.length > 0) fields.problem(`missing: ${missing.join(', ')}`);
}

/**
 * Reads trainer_state.json of a checkpoint.
 * @throws FormatError that names everything that is wrong with it
 */
export async function readTrainerState(folder: ByteFolder): Promise<TrainerState> {
  const where = `${folder.name}/${trainerStateFile}`;
  const fields = new JsonFields(parseJsonObject(await readText(folder, trainerStateFile), where), where);
  const version = fields.integer('version', 0);
  if (version !== formatVersion) {
    throw new FormatError(
      `${where}: the format is version ${version}; this program reads version ${formatVersion} and resumes with no other`,
    );
  }
  requireKeys(fields, stateKeys);
  const object = (key: string): JsonObject => {
    const value = fields.raw(key);
    if (isJsonObject(value)) return value;
    if (value !== undefined) fields.problem(`${key} must be an object`);
    return {};
  };
  const sampler = new JsonFields(object('sampler'), `${where}: sampler`);
  requireKeys(sampler, samplerKeys);
  const evaluations = new JsonFields(object('evaluations'), `${where}: evaluations`);
  requireKeys(evaluations, ['best', 'bad', 'plateau']);
  const plateau = evaluations.raw('plateau');
  const fall = new JsonFields(isJsonObject(plateau) ? plateau : {}, `${where}: evaluations.plateau`);
  if (isJsonObject(plateau)) requireKeys(fall, ['rate', 'best', 'bad', 'cooldown']);
  const numberOrNull = (from: JsonFields, key: string): number | null =>
    from.isNull(key) ? null : from.number(key, 0);
  const state: TrainerState = {
    global_step: fields.integer('global_step', 0, 1),
    max_steps: fields.integer('max_steps', 0, 1),
    epoch: fields.number('epoch', 0),
    micro_step: fields.integer('micro_step', 0),
    skipped_steps: fields.integer('skipped_steps', 0),
    sampler: {
      seed: sampler.integer('seed', 0),
      length: sampler.integer('length', 0),
      batchSize: sampler.integer('batchSize', 1, 1),
      shuffle: sampler.boolean('shuffle', true),
      dropLast: sampler.boolean('dropLast', false),
      groupSize: sampler.integer('groupSize', 1, 1),
      grouped: sampler.boolean('grouped', false),
      epoch: sampler.integer('epoch', 0),
      position: sampler.integer('position', 0),
    },
    best_metric: numberOrNull(fields, 'best_metric'),
    best_global_step: fields.isNull('best_global_step') ? null : fields.integer('best_global_step', 0),
    evaluations: {
      best: numberOrNull(evaluations, 'best'),
      bad: evaluations.integer('bad', 0),
      plateau: isJsonObject(plateau)
        ? {
            rate: fall.number('rate', 0),
            best: numberOrNull(fall, 'best'),
            bad: fall.integer('bad', 0),
            cooldown: fall.integer('cooldown', 0),
          }
        : null,
    },
    evaluation_due: fields.boolean('evaluation_due', false),
    seconds: fields.number('seconds', 0),
    peak_memory_bytes: fields.integer('peak_memory_bytes', 0),
    parameters_hash: fields.string('parameters_hash', ''),
    fixed: object('fixed'),
    caller: fields.raw('caller') ?? null,
  };
  for (const [name, part] of [
    ['sampler', sampler],
    ['evaluations', evaluations],
    ['evaluations.plateau', fall],
  ] as const) {
    fields.problems.push(...part.problems.map((problem) => `${name}: ${problem}`));
  }
  fields.finish();
  return state;
}

/**
 * Opens a checkpoint: reads where it stands, and the header of the optimizer's file, which the caller closes.
 * @throws FormatError when a file is missing or broken
 */
export async function openTrainerState(folder: ByteFolder): Promise<OpenCheckpoint> {
  const state = await readTrainerState(folder);
  const source = await folder.open(optimizerFile);
  if (source === undefined) throw new FormatError(`${folder.name}: there is no ${optimizerFile}`);
  return { state, optimizer: await openSafetensors(source) };
}

const shown = (value: JsonValue | undefined): string => {
  const text = value === undefined ? 'not set' : formatJson(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
};

/**
 * Checks that a run is the one that a checkpoint was made in.
 * @throws LorikeetError that names everything that differs, with both values
 */
export function checkFixed(saved: JsonObject, now: JsonObject): void {
  const keys = [...new Set([...Object.keys(saved), ...Object.keys(now)])];
  const differ = keys.filter((key) => formatJson(saved[key] ?? null) !== formatJson(now[key] ?? null));
  if (differ.length === 0) return;
  const list = differ.map((key) => `  - ${key} is ${shown(now[key])} but was ${shown(saved[key])}`).join('\n');
  throw new LorikeetError(
    `the checkpoint is of another run, and going on would give neither:\n${list}\nSet it back, or begin anew.`,
  );
}
