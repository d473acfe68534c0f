/** Names of keys and values that a run file may hold beside its own: other spellings, and what other tools know. */
import { adapterSections } from './config-adapter.js';

/** Accepted names and the name that counts. */
export const aliases: Readonly<Record<string, string>> = {
  model: 'model_name_or_path',
  base_model: 'model_name_or_path',
  max_seq_length: 'max_length',
  cutoff_len: 'max_length',
  batch_size: 'per_device_train_batch_size',
  micro_batch_size: 'per_device_train_batch_size',
  epochs: 'num_train_epochs',
  torch_dtype: 'dtype',
  evaluation_strategy: 'eval_strategy',
};

/** Names that are common elsewhere and too far from ours for the spelling to find them. */
export const suggestions: Readonly<Record<string, string>> = {
  rank: 'lora.r',
  lora_r: 'lora.r',
  lora_rank: 'lora.r',
  alpha: 'lora.lora_alpha',
  lora_alpha: 'lora.lora_alpha',
  dropout: 'lora.lora_dropout',
  lora_dropout: 'lora.lora_dropout',
  lora_target: 'lora.target_modules',
  lora_target_modules: 'lora.target_modules',
  target_modules: 'lora.target_modules',
  'lora.rank': 'lora.r',
  'lora.alpha': 'lora.lora_alpha',
  'lora.dropout': 'lora.lora_dropout',
  'lora.keys': 'lora.target_modules',
  lr: 'learning_rate',
  iters: 'max_steps',
  steps: 'max_steps',
  steps_per_eval: 'eval_steps',
  adapter_path: 'output_dir',
  dataset: 'dataset_name',
  datasets: 'dataset_name',
  data: 'train_file',
  val_size: 'validation_split',
  val_set_size: 'validation_split',
  grad_checkpoint: 'gradient_checkpointing',
  grad_accumulation_steps: 'gradient_accumulation_steps',
};

/** Keys that mean something elsewhere and change nothing here, with the reason. */
export const noops: Readonly<Record<string, string>> = {
  device_map: 'the whole model runs on one adapter; `device` chooses it',
  attn_implementation: 'flash attention is always on',
  bnb_4bit_compute_dtype: 'sums are in float32, and activations are what `dtype` says',
  bnb_4bit_quant_storage: 'it is said of files alone',
  gradient_checkpointing_kwargs: 'checkpointing here has no variants',
  task_type: 'models are trained as causal language models',
  ...Object.fromEntries(
    ['prompt_tuning', 'prefix_tuning'].flatMap((section) =>
      ['token_dim', 'num_layers', 'num_attention_heads', 'num_transformer_submodules'].map((key) => [
        `${section}.${key}`,
        'the model says it',
      ]),
    ),
  ),
  'prompt_tuning.tokenizer_name_or_path': "the model's tokenizer is meant",
  'prompt_tuning.tokenizer_kwargs': "the model's tokenizer is meant",
  // What an adapter_config.json says beside the settings of its method.
  ...Object.fromEntries(
    adapterSections.flatMap((section) => [
      [`${section}.task_type`, 'models are trained as causal language models'],
      [`${section}.peft_type`, 'the name of the section says it'],
      [`${section}.inference_mode`, 'it is set when the adapter is written'],
      [`${section}.base_model_name_or_path`, 'model_name_or_path says it'],
      [`${section}.revision`, '`revision` beside model_name_or_path says it'],
      [`${section}.auto_mapping`, 'it is set when the adapter is written'],
      [`${section}.peft_version`, 'it is set when the adapter is written'],
    ]),
  ),
};

/** Whether a value asks for something: null, false, 0, '' and empty collections do not. */
export function active(value: unknown): boolean {
  if (value === null || value === undefined || value === false || value === 0 || value === '') return false;
  if (typeof value === 'object') return Object.keys(value).length > 0;
  return true;
}

/** A key whose feature is not there yet. */
export interface LaterKey {
  /** Whether this value needs what is missing (default: {@link active}). */
  readonly asks?: (value: unknown) => boolean;
  readonly what: string;
  readonly instead?: string;
}

/** Keys whose feature is not there yet. An inactive value passes, anything else is refused. */
export const later: Readonly<Record<string, LaterKey>> = {
  packing: { what: 'packing several rows into one sequence' },
  load_in_8bit: { what: 'an 8-bit base model', instead: '`load_in_4bit: true` takes half the room.' },
  bf16: {
    what: 'bfloat16',
    instead: 'WebGPU has no bfloat16; `dtype: float16` with loss scaling takes the same room.',
  },
  loraplus_lr_embedding: { what: 'LoRA on embeddings' },
  save_only_model: { what: 'a checkpoint without the state of the optimizer' },
  'lora.lora_bias': { what: 'a bias on lora_B' },
  'lora.corda_config': { what: 'CorDA initialisation' },
  'lora.lora_ga_config': { what: 'LoRA-GA initialisation' },
  'lora.arrow_config': { what: 'Arrow routing' },
  'lora.alora_invocation_tokens': { what: 'activated LoRA' },
  'lora.layer_replication': { what: 'layer replication' },
  'lora.megatron_config': { what: 'Megatron' },
  'lora.megatron_core': { what: 'Megatron', asks: (value) => value !== null && value !== 'megatron.core' },
  'lora.trainable_token_indices': {
    what: 'choosing trainable token rows',
    instead: 'Rows of tokens that `special_tokens` adds are trained by default.',
  },
  'lora.target_parameters': { what: 'adapting bare parameters' },
  'lora.use_qalora': { what: 'QALoRA' },
  'lora.qalora_group_size': { what: 'QALoRA', asks: (value) => value !== null && value !== 16 },
  'lora.use_bdlora': { what: 'BD-LoRA' },
  'lora.fan_in_fan_out': { what: 'weights stored transposed' },
  'ia3.fan_in_fan_out': { what: 'weights stored transposed' },
  'lora.ensure_weight_tying': { what: 'tying adapters of tied weights' },
};

/** Values of supported keys that belong to something not there yet. */
export const laterValues: Readonly<Record<string, readonly string[]>> = {
  lr_scheduler_type: ['cosine_warmup_with_min_lr', 'greedy'],
  'lora.init_lora_weights': ['corda', 'lora_ga', 'mica'],
};
