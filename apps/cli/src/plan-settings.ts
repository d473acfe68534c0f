/** From a run file and a model's files to what a plan depends on. */
import { type AddedToken, type MistralConfig, type Tokenizer, withMistralConfig } from '@lorikeet/mistral';
import type { AdapterConfig } from '@lorikeet/peft';
import { isJsonObject } from '@lorikeet/tensor';
import { openCheckpointFolder } from '@lorikeet/tensor/node';
import { lengthsOf } from '@lorikeet/trainer';
import type { Config } from './config.js';
import { type AdapterContext, runAdapter } from './config-adapter.js';
import { UsageError } from './errors.js';
import { type PlanSettings, rowSizes } from './plan.js';
import { type RunData, withSpecialTokens } from './run-data.js';
import { deviceDType, type ModelFiles, neededVocabSize } from './session.js';
import { trainingArguments } from './training-arguments.js';

/**
 * The adapter of a run: what the file asks for, and the rows of new tokens.
 * @param base what the adapter's files say of its base
 * @throws UsageError where there are new tokens whose rows the method's files have no place for
 */
export function runAdapterConfig(
  config: Config,
  model: MistralConfig,
  added: readonly Pick<AddedToken, 'id'>[],
  base: Omit<AdapterContext, 'trainable_token_indices'> = {},
): AdapterConfig {
  const adapter = runAdapter(config);
  const rows = added.map(({ id }) => id);
  // Of a module that is trained whole the new rows are a part.
  const tables = (model.tie_word_embeddings ? ['embed_tokens'] : ['embed_tokens', 'lm_head']).filter(
    (name) => !namesModule(adapter.modulesToSave, name),
  );
  const trained =
    rows.length === 0 || tables.length === 0 ? null : Object.fromEntries(tables.map((name) => [name, rows]));
  if (trained !== null && !adapter.tokenRows) {
    const whole = adapter.savesModules
      ? `Set ${adapter.section}.modules_to_save: [${tables.join(', ')}], which trains and stores them whole, or use lora`
      : 'Use lora';
    throw new UsageError(
      `special_tokens adds ${rows.length} ${rows.length === 1 ? 'token' : 'tokens'}, whose rows of ${tables.join(' and ')} must be trained, and the files of ${adapter.title} have no place for rows`,
      { fix: `${whole}; or use tokens that the model has.` },
    );
  }
  return adapter.config({ ...base, trainable_token_indices: trained });
}

/** Whether `modules_to_save` names a module, by the ending of its path. */
function namesModule(saved: readonly string[], name: string): boolean {
  return saved.some((entry) => entry === name || entry.endsWith(`.${name}`));
}

/** Whether the linear layers are stored in 4 bits: the run asks for it, or the checkpoint holds them so. */
export function inFourBits(config: Config, files: ModelFiles): boolean {
  return config.load_in_4bit || files.config.quantization === 'nf4';
}

/** Whether the checkpoint's 4-bit weights have scales in f32, which are kept as they are. */
function wideScales({ config }: ModelFiles): boolean {
  const stored = config.source['quantization_config'];
  return config.quantization === 'nf4' && isJsonObject(stored) && stored['bnb_4bit_use_double_quant'] !== true;
}

/** Storage of weights and activations: what the run asks for, else what the checkpoint has, else what its configuration says. */
async function plannedDType(config: Config, files: ModelFiles): Promise<'f32' | 'f16'> {
  if (config.fp16 || config.dtype === 'float16') return 'f16';
  if (config.dtype === 'float32') return 'f32';
  const named = files.config.torch_dtype === null || files.config.torch_dtype === 'float32' ? 'f32' : 'f16';
  try {
    const file = await openCheckpointFolder(files.folder);
    try {
      return deviceDType('auto', file);
    } finally {
      await file.close();
    }
  } catch {
    // The weights need not be here yet; loading says what is wrong with them.
    return named;
  }
}

/** Special tokens that the run adds; without a tokenizer all that it names count as new. */
function addedTokens(
  config: Config,
  model: MistralConfig,
  tokenizer: Tokenizer | undefined,
): { readonly added: readonly Pick<AddedToken, 'id'>[]; readonly tokenizer?: Tokenizer } {
  if (tokenizer !== undefined) return withSpecialTokens(tokenizer, config.special_tokens);
  const { bos_token, eos_token, pad_token, additional_special_tokens } = config.special_tokens;
  const texts = new Set([bos_token, eos_token, pad_token, ...additional_special_tokens].filter((t) => t !== null));
  return { added: [...texts].map((_, i) => ({ id: model.vocab_size + i })) };
}

/**
 * What the plan of a run depends on. Without `data` every row has `max_length` tokens, all of them trained, and the
 * number of steps is known only if the run file says it.
 */
export async function planSettings(
  config: Config,
  files: ModelFiles,
  data: RunData | undefined,
): Promise<PlanSettings> {
  const { added, tokenizer } = data ?? addedTokens(config, files.config, files.tokenizer);
  const vocab = added.reduce((most, { id }) => Math.max(most, id + 1), neededVocabSize(files.config, tokenizer));
  const model = vocab > files.config.vocab_size ? withMistralConfig(files.config, { vocab_size: vocab }) : files.config;
  const heldOut =
    data === undefined ? config.validation_split > 0 || config.validation_file !== null : data.validation !== undefined;
  return {
    model,
    dtype: await plannedDType(config, files),
    load_in_4bit: inFourBits(config, files),
    wideScales: wideScales(files),
    adapter: runAdapterConfig(config, model, added),
    per_device_train_batch_size: config.per_device_train_batch_size,
    gradient_accumulation_steps: config.gradient_accumulation_steps,
    max_length: config.max_length,
    gradient_checkpointing: config.gradient_checkpointing,
    steps: plannedSteps(config, data) ?? 0,
    loraplus_lr_ratio: config.loraplus_lr_ratio,
    neftune_noise_alpha: config.neftune_noise_alpha,
    packing: config.packing,
    per_device_eval_batch_size: heldOut ? config.per_device_eval_batch_size : 0,
    ...(data === undefined
      ? {}
      : {
          rows: {
            train: rowSizes(data.sequences),
            validation: rowSizes(data.validation?.examples ?? []),
            ...(config.packing ? { packed: lengthsOf(data.train.examples) } : {}),
          },
        }),
  };
}

/** Optimizer steps of the run, if they follow from what is known. */
export function plannedSteps(config: Config, data: RunData | undefined): number | undefined {
  if (data !== undefined) return trainingArguments(config, data.sequences.length).total;
  return config.max_steps > 0 ? config.max_steps : undefined;
}
