/** Names of keys and values that a run file may hold beside its own: other spellings, and what other tools know. */
import { adapterSections } from './config-adapter.js';

/** Accepted names and the name that counts; values mean the same. */
export const aliases: Readonly<Record<string, string>> = {
  model: 'model_name_or_path',
  base_model: 'model_name_or_path',
  model_name: 'model_name_or_path',
  base_model_name_or_path: 'model_name_or_path',
  pretrained_model_name_or_path: 'model_name_or_path',
  model_revision: 'revision',
  max_seq_length: 'max_length',
  max_seq_len: 'max_length',
  cutoff_len: 'max_length',
  sequence_len: 'max_length',
  batch_size: 'per_device_train_batch_size',
  micro_batch_size: 'per_device_train_batch_size',
  eval_batch_size: 'per_device_eval_batch_size',
  grad_accumulation_steps: 'gradient_accumulation_steps',
  epochs: 'num_train_epochs',
  num_epochs: 'num_train_epochs',
  iters: 'max_steps',
  lr: 'learning_rate',
  lr_scheduler: 'lr_scheduler_type',
  clip_grad_norm: 'max_grad_norm',
  grad_checkpoint: 'gradient_checkpointing',
  enable_activation_checkpointing: 'gradient_checkpointing',
  torch_dtype: 'dtype',
  val_size: 'validation_split',
  val_set_size: 'validation_split',
  eval_file: 'validation_file',
  mask_prompt: 'completion_only_loss',
  sample_packing: 'packing',
  evaluation_strategy: 'eval_strategy',
  steps_per_eval: 'eval_steps',
  steps_per_report: 'logging_steps',
  log_every_n_steps: 'logging_steps',
  save_every: 'save_steps',
  adapter_path: 'output_dir',
  label_smoothing: 'label_smoothing_factor',
  lora_r: 'lora.r',
  lora_rank: 'lora.r',
  'lora.rank': 'lora.r',
  lora_alpha: 'lora.lora_alpha',
  'lora.alpha': 'lora.lora_alpha',
  lora_dropout: 'lora.lora_dropout',
  'lora.dropout': 'lora.lora_dropout',
  lora_target: 'lora.target_modules',
  lora_target_modules: 'lora.target_modules',
  'lora.lora_target_modules': 'lora.target_modules',
  'lora.keys': 'lora.target_modules',
  lora_modules_to_save: 'lora.modules_to_save',
  use_rslora: 'lora.use_rslora',
  peft_use_rslora: 'lora.use_rslora',
  use_dora: 'lora.use_dora',
  peft_use_dora: 'lora.use_dora',
};

/** Other names of sections. */
export const sectionAliases: Readonly<Record<string, string>> = {
  lora_parameters: 'lora',
  lora_config: 'lora',
  peft_config: 'lora',
};

/** Other names of element types. */
export const dtypeSpellings: Readonly<Record<string, string>> = {
  float: 'float32',
  fp32: 'float32',
  half: 'float16',
  fp16: 'float16',
};

/** Names that are common elsewhere and too far from ours for the spelling to find them; what they take differs. */
export const suggestions: Readonly<Record<string, string>> = {
  rank: 'lora.r',
  alpha: 'lora.lora_alpha',
  dropout: 'lora.lora_dropout',
  target_modules: 'lora.target_modules',
  dataset: 'dataset_name',
  datasets: 'dataset_name',
  data: 'train_file',
  dataset_text_field: 'prompt_template',
  test_size: 'validation_split',
  resume: 'resume_from_checkpoint',
};

/** Keys of other tools whose matter is said otherwise here. Refused where they ask for something. */
export const elsewhere: Readonly<Record<string, string>> = {
  overwrite_output_dir: 'give --overwrite on the command line',
  train_on_inputs: 'set completion_only_loss: false to train the prompts too',
  train_on_prompt: 'set completion_only_loss: false to train the prompts too',
  lora_target_linear: 'set lora.target_modules: all-linear',
  quantization_bit: 'set load_in_4bit: true',
  evals_per_epoch: 'set eval_strategy: steps and eval_steps, which below 1 is a share of all steps',
  saves_per_epoch: 'set save_steps, which below 1 is a share of all steps',
  max_steps_per_epoch: 'set max_steps, which ends the run',
  num_layers: 'set lora.layers_to_transform to a list of layers',
  'lora.scale': 'set lora.lora_alpha to the scale times lora.r',
  resume_adapter_file: 'set resume_from_checkpoint, or give --resume, with the folder of a checkpoint',
  auto_resume_from_checkpoints: 'set resume_from_checkpoint: true',
};

/** The same reason for several keys. */
function reasons(reason: string, keys: readonly string[]): Record<string, string> {
  return Object.fromEntries(keys.map((key) => [key, reason]));
}

/** Keys that mean something elsewhere and change nothing here, with the reason. */
export const noops: Readonly<Record<string, string>> = {
  device_map: 'the whole model runs on one adapter; `device` chooses it',
  attn_implementation: 'flash attention is always on',
  bnb_4bit_compute_dtype: 'sums are in float32, and activations are what `dtype` says',
  bnb_4bit_quant_storage: 'it is said of files alone',
  gradient_checkpointing_kwargs: 'checkpointing here has no variants',
  task_type: 'models are trained as causal language models',
  ...reasons('the checkpoint says it', ['model_type', 'tokenizer_type', 'tokenizer_name', 'use_fast_tokenizer']),
  ...reasons('flash attention is always on', ['flash_attention', 'flash_attn', 'sdp_attention', 'xformers_attention']),
  ...reasons('sums are in float32', ['tf32', 'bf16_full_eval', 'fp16_full_eval', 'upcast_layernorm']),
  ...reasons('rows are read and padded in this process', [
    'dataloader_num_workers',
    'dataloader_pin_memory',
    'preprocessing_num_workers',
    'dataset_num_proc',
    'dataset_processes',
    'dataset_prepared_path',
    'overwrite_cache',
    'remove_unused_columns',
    'pad_to_sequence_len',
  ]),
  ...reasons('there is one device', ['ddp_timeout', 'ddp_find_unused_parameters', 'local_rank', 'world_size']),
  ...reasons('kernels are always compiled', ['compile', 'torch_compile', 'use_unsloth', 'use_cache']),
  do_eval: 'eval_strategy says when there are evaluations',
  save_safetensors: 'adapters are always safetensors files',
  logging_dir: 'event files are written into output_dir',
  plot_loss: 'report.html is always written',
  strict: 'unknown keys are always errors',
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
  load_in_8bit: { what: 'an 8-bit base model', instead: '`load_in_4bit: true` takes half the room.' },
  bf16: {
    what: 'bfloat16',
    asks: (value) => active(value) && value !== 'auto',
    instead: 'WebGPU has no bfloat16; `dtype: float16` with loss scaling takes the same room.',
  },
  ...Object.fromEntries(
    ['optim', 'optimizer'].map((name) => [
      name,
      {
        what: 'another optimizer than AdamW',
        asks: (value: unknown): boolean =>
          active(value) && !(typeof value === 'string' && /^adamw(_torch(_fused)?|_hf)?$/.test(value)),
      },
    ]),
  ),
  ...Object.fromEntries(
    ['adapter', 'finetuning_type', 'fine_tune_type'].map((name) => [
      name,
      {
        what: 'another way of training than LoRA',
        asks: (value: unknown): boolean => active(value) && value !== 'lora',
        instead:
          'A section ia3, ln_tuning, bottleneck, prompt_tuning or prefix_tuning is another method, and load_in_4bit: true is QLoRA.',
      },
    ]),
  ),
  use_peft: { what: 'training without an adapter', asks: (value) => value === false },
  stage: { what: 'another stage than sft', asks: (value) => active(value) && value !== 'sft' },
  ...Object.fromEntries(
    ['train', 'do_train'].map((name) => [
      name,
      {
        what: 'a run that does not train',
        asks: (value: unknown): boolean => value === false,
        instead: '`lorikeet eval` measures a model.',
      },
    ]),
  ),
  ...Object.fromEntries(
    ['deepspeed', 'fsdp', 'fsdp_config'].map((name) => [name, { what: 'training on several devices' }]),
  ),
  max_samples: { what: 'a part of the rows', instead: 'Cut the data file, or set max_steps.' },
  max_train_samples: { what: 'a part of the rows', instead: 'Cut the data file, or set max_steps.' },
  push_to_hub: { what: 'uploading' },
  hub_model_id: { what: 'uploading' },
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

/** A name before its first dot, and what is behind it. */
export function splitOnce(name: string): [string, string | undefined] {
  const dot = name.indexOf('.');
  return dot === -1 ? [name, undefined] : [name.slice(0, dot), name.slice(dot + 1)];
}

/** The name here of a key that is spelled otherwise, by other tools or with hyphens. */
export function ownName(spelled: string): string {
  const [first, key] = splitOnce(spelled.replaceAll('-', '_'));
  const name = key === undefined ? first : `${ownSection(first)}.${key}`;
  return Object.hasOwn(aliases, name) ? (aliases[name] ?? name) : name;
}

/** The same of a section. */
export function ownSection(spelled: string): string {
  return Object.hasOwn(sectionAliases, spelled) ? (sectionAliases[spelled] ?? spelled) : spelled;
}
