/** What each key of a run file means, in a line: for editors, for `lorikeet config keys` and for the file that `init` writes. */
import type { AdapterSection, AdapterSections } from './config-adapter.js';
import type { Config, SpecialTokens } from './config-schema.js';

type Meanings<Keys> = { readonly [Key in keyof Keys]-?: string };

const top: Meanings<Config> = {
  model_name_or_path: 'Base model: a folder in Hugging Face layout, or an id on the hub',
  revision: 'Branch, tag or commit of the base model on the hub',
  cache_dir: 'Where downloads are kept; HF_HOME where it is not set',

  dataset_name: 'Data set on the hub, or a folder of data files',
  dataset_config_name: 'Which part of a data set that has several',
  train_file: 'Rows to train on: .jsonl, .json, .csv, .tsv or .parquet',
  train_mixture:
    'Several sets of training rows, each with its share; each is as train_file or dataset_name would be alone',
  mixture_stopping: 'How many rows the mixture has',
  validation_file: 'Rows to evaluate on; without them a share of the training rows is held out',
  validation_split: 'Share of the training rows that is held out, drawn by the seed; 0 holds out nothing',
  streaming:
    'Rows and their tokens lie in files under output_dir while the run goes on, for data larger than memory; the losses are the same',
  prompt_template:
    'How a row becomes a text: fingpt, alpaca, prompt_completion, response_tokens, text, or a text with {columns}, the last of which is the answer; without it the columns decide',
  response_template: 'For rows that are one text: what ends the prompt; the text behind it is trained',
  chat_template:
    "For rows of messages: chatml, zephyr, mistral, llama2, or a file of Jinja; without it the tokenizer's own",
  completion_only_loss: 'Trains the answers alone, which is the default; false trains the prompts too',
  assistant_only_loss: 'Trains the messages of the assistant alone, which is the default; false trains all of them',
  max_length: 'Longest row in tokens',
  overlong: 'What becomes of a row that is longer: an error, left out, or its prompt cut at the front',
  special_tokens: 'Special tokens to set or to add; the rows of new ones are trained',

  lora: 'LoRA, the method where no other section is there',
  ia3: '(IA)^3: scales of keys, values and inner activations',
  ln_tuning: 'Trains the norms alone',
  bottleneck: "AdapterHub's bottlenecks, files included",
  prompt_tuning: 'Trained tokens before the prompt',
  prefix_tuning: 'Trained keys and values before the prompt, in every layer',

  per_device_train_batch_size: 'Rows that go through the model at once',
  per_device_eval_batch_size: 'The same in evaluations',
  gradient_accumulation_steps: 'Batches whose gradients make one optimizer step',
  num_train_epochs: 'How often the rows are gone through',
  max_steps: 'Optimizer steps in place of epochs',
  learning_rate: 'Learning rate at the peak of the schedule',
  lr_scheduler_type: 'How the learning rate changes over the run',
  lr_scheduler_kwargs: 'Settings of the schedule',
  warmup_ratio: 'Share of the steps in which the learning rate rises',
  warmup_steps: 'Steps in which it rises, in place of warmup_ratio',
  loraplus_lr_ratio: 'LoRA+: factor of the learning rate of lora_B',
  label_smoothing_factor: "Share of each label's weight that all tokens get alike, in training",
  neftune_noise_alpha: 'NEFTune: noise on the embedded tokens, in training',
  group_by_length: 'Rows of like length come together, which saves padding',
  packing: 'Several rows share a sequence of up to max_length tokens, each for itself',
  packing_strategy: 'How rows are put together',
  weight_decay: 'Weight decay of AdamW; one-axis parameters have none',
  adam_beta1: 'Decay of the mean of the gradients',
  adam_beta2: 'Decay of the mean of their squares',
  adam_epsilon: 'Added to the root of the squares',
  max_grad_norm: 'Longest gradient; longer ones are scaled down',
  gradient_checkpointing: 'Computes activations twice and keeps few: less memory, a third more arithmetic',
  dtype: 'Element type of the base weights and the activations; auto is that of the checkpoint',
  fp16: 'The same as dtype: float16',
  load_in_4bit: 'Stores the linear layers of the base in 4 bits (QLoRA)',
  bnb_4bit_quant_type: 'The 4-bit type',
  bnb_4bit_use_double_quant: 'Whether the scales of the 4-bit weights are quantised too',
  seed: 'Seed of everything that is drawn',
  data_seed: 'Seed of the split and the order of the rows, in place of seed',

  eval_strategy: 'When the held-out rows are evaluated',
  eval_steps: 'Steps between evaluations; logging_steps where it is not set',
  eval_delay: 'Steps, or epochs, before the first evaluation',
  save_strategy: 'When a checkpoint is written',
  save_steps: 'Steps between checkpoints',
  save_total_limit: 'Most checkpoints that are kept; the newest and the best always are',
  save_on_interrupt: 'Ctrl-C writes a checkpoint',
  metric_for_best_model: 'What makes an evaluation the best; the loss where it is not set',
  greater_is_better: 'Whether more of that metric is better; the metric says it where it is not set',
  load_best_model_at_end: 'The adapter that is saved at the end is that of the best checkpoint',
  early_stopping_patience: 'Evaluations in a row without an improvement after which the run ends',
  early_stopping_threshold: 'How much better counts as an improvement',
  resume_from_checkpoint: 'A checkpoint to go on from, as --resume',
  logging_steps: 'Steps between lines of the log',
  logging_first_step: 'A line after the first step too',
  output_dir: 'Where the adapter, the checkpoints and the log go',
  run_name: 'Name of the run where it is shown',
  report_to: 'Where numbers go beside train_log.jsonl, which is always written',

  memory_limit_gb: 'Most GPU memory that the run may take, in GB; a run that needs more is refused before it starts',
  max_gflop_per_dispatch:
    'Longer kernels are cut, in 10^9 operations: for systems that end a device that is busy too long',
  device: 'Which GPU',
};

const targets = {
  target_modules: 'Which layers: their names, or all-linear',
  exclude_modules: 'Layers among these that are left out',
  modules_to_save: 'Modules that are trained and saved whole',
};

const virtualTokens = 'How many trained tokens';

const sections: { readonly [Name in AdapterSection]: Meanings<AdapterSections[Name]> } & {
  readonly special_tokens: Meanings<SpecialTokens>;
} = {
  special_tokens: {
    bos_token: 'Begins every text',
    eos_token: 'Ends every answer',
    pad_token: 'Fills short rows',
    additional_special_tokens: 'More tokens, such as those that a template has',
  },
  lora: {
    r: 'Rank of the update',
    lora_alpha: 'Scale of the update: it is multiplied by lora_alpha / r',
    lora_dropout: 'Share of the inputs of the update that is dropped in training',
    ...targets,
    bias: 'Which biases are trained',
    use_rslora: 'Scales by lora_alpha / sqrt(r)',
    use_dora: 'DoRA: trains the lengths of the rows too',
    init_lora_weights: 'How the factors start',
    loftq_config: 'Settings of LoftQ',
    eva_config: 'Settings of EVA',
    rank_pattern: 'Ranks of single layers',
    alpha_pattern: 'Alphas of single layers',
    layers_to_transform: 'Numbers of the blocks that get the adapter',
    layers_pattern: 'Name of the list of blocks',
  },
  ia3: {
    ...targets,
    feedforward_modules: 'The targets whose inputs are scaled, rather than their outputs',
    init_ia3_weights: 'Starts with scales of one',
  },
  ln_tuning: targets,
  bottleneck: {
    kind: 'Where the bottlenecks stand, with the defaults of that kind',
    name: "The adapter's name, which is part of the names in its file",
    mh_adapter: 'A bottleneck behind the attention',
    output_adapter: 'A bottleneck behind the feed-forward part',
    non_linearity: 'Function between the two matrices',
    reduction_factor: 'Width of the model by width of the bottleneck',
    is_parallel: 'Beside the feed-forward part rather than behind it',
    scaling: 'Factor of what it adds',
    original_ln_before: 'Reads its input before the norm',
    init_weights: 'How the matrices start',
  },
  prompt_tuning: {
    num_virtual_tokens: virtualTokens,
    prompt_tuning_init: 'How they start',
    prompt_tuning_init_text: 'The text that they start as',
  },
  prefix_tuning: {
    num_virtual_tokens: virtualTokens,
    prefix_projection: 'Trains a network that gives the keys and values',
    encoder_hidden_size: 'Inner size of that network',
    init_weights: 'How the keys and values start',
  },
};

const byName: ReadonlyMap<string, string> = new Map(
  Object.entries(top).concat(
    Object.entries(sections).flatMap(([section, keys]) =>
      Object.entries(keys).map(([key, text]): [string, string] => [`${section}.${key}`, text]),
    ),
  ),
);

/** What a key means, by its dotted name; undefined where there is no such key. */
export function keyMeaning(name: string): string | undefined {
  return byName.get(name);
}
