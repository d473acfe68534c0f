import { readFile } from 'node:fs/promises';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { compareConfigs } from './checkpoint.js';
import { type Config, dumpConfig, loadConfig, type ResolvedConfig, resolveConfig } from './config.js';
import { adapterSections } from './config-adapter.js';
import { configKeys } from './config-schema.js';
import { UsageError } from './errors.js';

const resolve = (text: string, overrides: string[] = []): ResolvedConfig =>
  resolveConfig({ file: { path: 'run.yaml', text }, overrides });

function mistake(text: string, overrides: string[] = []): string {
  try {
    resolve(text, overrides);
  } catch (error) {
    if (error instanceof UsageError) return error.message;
    throw error;
  }
  throw new Error('it was accepted');
}

/** The recipe that the walk-through of this project starts from. */
const recipe = `
model_name_or_path: org/model   # a hub id
dataset_name: FinGPT/fingpt-sentiment-train
lora:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.1
  target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
num_train_epochs: 1
learning_rate: 1e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
max_grad_norm: 1.0
gradient_checkpointing: true
fp16: true
special_tokens:
  eos_token: <|im_end|>
  pad_token: <pad>
  additional_special_tokens: [<response>, <response|end>]
response_template: <response>
evaluation_strategy: steps
eval_steps: 1000
logging_steps: 5
`;

describe('resolveConfig', () => {
  it('reads the recipe', () => {
    const { config, notes } = resolve(recipe);
    expect(config).toMatchObject({
      model_name_or_path: 'org/model',
      lora: { r: 16, lora_alpha: 32, lora_dropout: 0.1, bias: 'none', use_rslora: false },
      learning_rate: 1e-4,
      lr_scheduler_type: 'cosine',
      eval_strategy: 'steps',
      eval_steps: 1000,
      fp16: true,
      special_tokens: { eos_token: '<|im_end|>', additional_special_tokens: ['<response>', '<response|end>'] },
      validation_split: 0.1,
      overlong: 'error',
    });
    expect(notes).toEqual(['evaluation_strategy is read as eval_strategy']);
  });

  it('has the defaults of Hugging Face', () => {
    expect(resolveConfig({}).config).toMatchObject({
      lora: { r: 8, lora_alpha: 8, lora_dropout: 0, target_modules: null, bias: 'none', init_lora_weights: true },
      per_device_train_batch_size: 8,
      gradient_accumulation_steps: 1,
      num_train_epochs: 3,
      max_steps: -1,
      learning_rate: 5e-5,
      lr_scheduler_type: 'linear',
      weight_decay: 0,
      adam_beta1: 0.9,
      adam_beta2: 0.999,
      adam_epsilon: 1e-8,
      max_grad_norm: 1,
      max_length: 1024,
      seed: 42,
      report_to: ['jsonl'],
    });
  });

  it('an empty file is one without keys', () => expect(resolve('# nothing').config).toEqual(resolveConfig({}).config));

  it.each([
    ['model: a', 'model_name_or_path', 'a'],
    ['base_model: a', 'model_name_or_path', 'a'],
    ['max_seq_length: 64', 'max_length', 64],
    ['cutoff_len: 64', 'max_length', 64],
    ['batch_size: 2', 'per_device_train_batch_size', 2],
    ['micro_batch_size: 2', 'per_device_train_batch_size', 2],
    ['epochs: 2', 'num_train_epochs', 2],
    ['torch_dtype: torch.float16', 'dtype', 'float16'],
    ['evaluation_strategy: no', 'eval_strategy', 'no'],
    ['report_to: none', 'report_to', []],
    ['report_to: jsonl', 'report_to', ['jsonl']],
    ['report_to: tensorboard', 'report_to', ['tensorboard']],
    ['report_to: [jsonl, wandb]', 'report_to', ['jsonl', 'wandb']],
    ['warmup_steps: 0.1', 'warmup_steps', 0.1],
    ['num_train_epochs: 0.5', 'num_train_epochs', 0.5],
    ['seed:', 'seed', 42],
    ['train_file: [a.jsonl, b.jsonl]', 'train_file', ['a.jsonl', 'b.jsonl']],
  ])('%s', (text, key, value) => {
    const { config } = resolve(text);
    expect(Object.entries(config).find(([name]) => name === key)?.[1]).toEqual(value);
  });

  it('overrides on the command line win, dotted or as a map, in YAML', () => {
    const { config, given } = resolve('learning_rate: 1\nlora: {r: 4, lora_alpha: 16}', [
      'lora.r=32',
      'lora={lora_dropout: 0.5}',
      'lora.target_modules=[q_proj, v_proj]',
      'epochs=2',
      'special_tokens.pad_token=<pad>',
      'prompt_template={instruction}\\n{input} = {output}',
      'learning_rate=',
      'run_name=12',
      'response_template="a\\nb"',
      'output_dir=a: b',
    ]);
    expect(config.lora).toMatchObject({
      r: 32,
      lora_alpha: 16,
      lora_dropout: 0.5,
      target_modules: ['q_proj', 'v_proj'],
    });
    expect(config.num_train_epochs).toBe(2);
    expect(config.special_tokens.pad_token).toBe('<pad>');
    expect(config.prompt_template).toBe('{instruction}\\n{input} = {output}');
    expect(config.learning_rate).toBe(5e-5);
    expect(config).toMatchObject({ run_name: '12', response_template: 'a\nb', output_dir: 'a: b' });
    expect(given.has('lora.r')).toBe(true);
    expect(given.has('seed')).toBe(false);
  });

  it('flags win over everything, and absent ones do not count', () => {
    const file = { path: 'run.yaml', text: 'dtype: float16\nrevision: v1' };
    expect(resolveConfig({ file, flags: { dtype: 'float32', revision: undefined } }).config).toMatchObject({
      dtype: 'float32',
      revision: 'v1',
    });
  });

  it.each([
    ['learning_rat: 1', /run\.yaml:1: unknown key "learning_rat"; did you mean learning_rate\?/],
    ['a: 1\nmax_sq_len: 1', /run\.yaml:2: unknown key "max_sq_len"; did you mean max_seq_len\?/],
    ['rank: 8', /did you mean lora\.r\?/],
    ['bias: none', /did you mean lora\.bias\?/],
    ['lora:\n  alhpa: 8', /run\.yaml:2: unknown key "lora\.alhpa"; did you mean lora\.alpha\?/],
    ['lora_parameters: {scale: 20}', /lora_parameters\.scale: 20 is said otherwise here: set lora\.lora_alpha to/],
    ['train_on_inputs: true', /train_on_inputs: true is said otherwise here: set completion_only_loss: false/],
    ['overwrite_output_dir: true', /give --overwrite on the command line/],
    ['optim: adamw_8bit', /optim: "adamw_8bit" asks for another optimizer than AdamW, which is not supported yet/],
    ['finetuning_type: full', /asks for another way of training than LoRA/],
    ['stage: dpo', /asks for another stage than sft/],
    ['trust-remote-code: true', /trust_remote_code: true is refused/],
    ['lora_r: 8\nlora: {r: 4}', /lora\.r and lora_r are the same key; keep one/],
    ['ia3: {}\nlora_r: 8', /lora and ia3 are both given|ia3 and lora are both given/],
    ['lora: {lora_droput: 0.1}', /did you mean lora\.lora_dropout\?/],
    ['special_tokens: {eos: x}', /did you mean special_tokens\.eos_token\?/],
    ['hub_token: x', /unknown key "hub_token"; a run file holds no credentials: set HF_TOKEN/],
    ['zzzzqqqq: 1', /unknown key "zzzzqqqq"; `lorikeet train --help`/],
    ['"__proto__": 1', /unknown key "__proto__"/],
    ['constructor: 1', /unknown key "constructor"/],
  ])('%s', (text, pattern) => expect(mistake(text)).toMatch(pattern));

  // As their users write them, but for the data, which every tool says in its own way.
  it.each([
    [
      'axolotl',
      `base_model: org/m
model_type: MistralForCausalLM
load_in_4bit: true
strict: false
val_set_size: 0.05
adapter: lora
sequence_len: 2048
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
tf32: false
flash_attention: true
warmup_steps: 10
deepspeed:
fsdp:
special_tokens:
`,
      {
        max_length: 2048,
        lora: { r: 32, lora_alpha: 16, target_modules: ['q_proj', 'v_proj'] },
        validation_split: 0.05,
      },
    ],
    [
      'LLaMA-Factory',
      `model_name_or_path: org/m
trust_remote_code: false
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj,v_proj
cutoff_len: 512
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/x
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: false
report_to: none
per_device_train_batch_size: 1
lr_scheduler_type: cosine
warmup_ratio: 0.1
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
eval_strategy: steps
eval_steps: 500
`,
      { lora: { r: 16, target_modules: ['q_proj', 'v_proj'] }, report_to: [], max_length: 512 },
    ],
    [
      'mlx_lm.lora',
      `model: org/m
train: true
fine_tune_type: lora
optimizer: adamw
mask_prompt: true
batch_size: 4
iters: 1000
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
adapter_path: adapters
save_every: 100
max_seq_length: 2048
grad_checkpoint: false
seed: 0
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 8
  alpha: 160
  dropout: 0.0
`,
      { lora: { r: 8, lora_alpha: 160 }, max_steps: 1000, save_steps: 100, output_dir: 'adapters' },
    ],
    [
      'TRL',
      `model_name_or_path: org/m
use_peft: true
lora_r: 16
lora_target: all
use_rslora: true
per-device-train-batch-size: 2
dataset_num_proc: 4
gradient_checkpointing_kwargs: {use_reentrant: false}
eval_strategy: epoch
save_strategy: epoch
torch_dtype: float16
optim: adamw_torch_fused
max_length: null
`,
      { lora: { r: 16, use_rslora: true, target_modules: 'all-linear' }, per_device_train_batch_size: 2 },
    ],
    [
      'torchtune',
      `batch_size: 2
epochs: 1
gradient_accumulation_steps: 8
enable_activation_checkpointing: true
clip_grad_norm: 1.0
log_every_n_steps: 1
compile: false
seed: null
dtype: fp16
`,
      { max_grad_norm: 1, gradient_checkpointing: true, logging_steps: 1, dtype: 'float16' },
    ],
  ])('takes the spelling of %s', (_tool, text, wanted) => {
    expect(resolve(text).config).toMatchObject(wanted);
  });

  it('takes dotted names in the file too', () => expect(resolve('lora.r: 4').config.lora?.r).toBe(4));

  it.each([
    ['learning_rate: fast', /run\.yaml:1: learning_rate must be a number above 0, not "fast"/],
    ['learning_rate: "1e-4"', /not "1e-4" \(a text: remove the quotes\)/],
    ['learning_rate: -1', /must be a number above 0, not -1/],
    ['learning_rate: .nan', /learning_rate must be/],
    ['run_name: 12', /run_name must be a text, not 12 \(a number: put it in quotes\)/],
    ['seed: 1.5', /seed must be a whole number/],
    ['lora:\n  r: 0', /run\.yaml:2: lora\.r must be a whole number, 1 or more, not 0/],
    ['lora: {r: eight}', /lora\.r must be a whole number, 1 or more, not "eight"/],
    ['lora: 8', /lora must be a map with the keys of adapter_config\.json, not 8/],
    ['lora: false', /training without an adapter is not supported yet/],
    ['fp16: yes', /fp16 must be true or false, not "yes" \(YAML 1\.2 writes true and false\)/],
    ['lora: {target_modules: []}', /lora\.target_modules must be a list of module names/],
    ['dtype: bfloat16', /WebGPU has no bfloat16; bfloat16 checkpoints are converted/],
    ['validation_split: 1', /from 0 to below 1, not 1/],
    ['eval_steps: 1.5', /eval_steps must be/],
    ['output_dir: ""', /output_dir must be a folder, not ""/],
    ['overlong: cut', /error, drop or truncate_prompt/],
    ['max_steps: 0', /-1 for "by epochs"/],
    ['trust_remote_code: true', /trust_remote_code: true is refused/],
    ['epochs: 1\nnum_train_epochs: 2', /run\.yaml:2: num_train_epochs and epochs are the same key; keep one/],
    ['fp16: true\ndtype: float32', /contradict each other/],
    ['train_file: a\ndataset_name: b', /train_file and dataset_name are both set/],
    ['warmup_ratio: 0.1\nwarmup_steps: 5', /warmup_ratio and warmup_steps are both set/],
    ['validation_file: a\nvalidation_split: 0.2', /validation_split and validation_file are both set/],
    ['eval_strategy: steps\nvalidation_split: 0\ntrain_file: a', /eval_strategy: steps needs validation data/],
  ])('%s', (text, pattern) => expect(mistake(text)).toMatch(pattern));

  it.each([
    'load_in_8bit: true',
    'report_to: mlflow',
    'lr_scheduler_type: cosine_warmup_with_min_lr',
    'loraplus_lr_embedding: 1e-6',
    'save_only_model: true',
    'bf16: true',
    'lora: {init_lora_weights: corda}',
    'lora: {lora_bias: true}',
  ])('%s is refused as not supported yet', (text) => expect(mistake(text)).toMatch(/not supported yet/));

  it('schedules with settings of their own, and what the schedule knows', () => {
    const { config } = resolve('lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 3}');
    expect(config).toMatchObject({ lr_scheduler_type: 'cosine_with_restarts', lr_scheduler_kwargs: { num_cycles: 3 } });
    expect(resolve(dumpConfig(config)).config).toEqual(config);
    expect(mistake('learning_rate: 1e-4\nlr_scheduler_kwargs: {power: 2}')).toBe(
      `run.yaml:2: lr_scheduler_kwargs: "power" is none of linear's, which has none`,
    );
    expect(mistake('lr_scheduler_type: cosine_with_min_lr')).toMatch(/needs min_lr or min_lr_rate/);
    expect(mistake('lr_scheduler_kwargs: [2]')).toMatch(/must be a map with settings of the schedule/);
  });

  it('what needs evaluations says so, and the best checkpoint needs one where there is an evaluation', () => {
    for (const asks of [
      'lr_scheduler_type: reduce_lr_on_plateau',
      'save_strategy: best',
      'load_best_model_at_end: true',
      'early_stopping_patience: 3',
      'eval_delay: 10',
    ]) {
      expect(mistake(asks)).toBe(`run.yaml:1: ${asks} needs evaluations: set eval_strategy to steps or epoch`);
      const saves = asks.startsWith('save_strategy') ? '' : '\nsave_strategy: epoch';
      expect(resolve(`${asks}\neval_strategy: epoch${saves}`).config.eval_strategy).toBe('epoch');
    }
    const best = 'load_best_model_at_end: true\neval_strategy: steps\neval_steps: 4\n';
    expect(resolve(`${best}save_steps: 8`).config.load_best_model_at_end).toBe(true);
    expect(resolve(`${best}save_strategy: best`).config.save_strategy).toBe('best');
    expect(mistake(`${best}save_steps: 6`)).toMatch(/save_steps \(6\) to be a multiple of eval_steps \(4\)/);
    expect(mistake(`${best}save_strategy: epoch`)).toMatch(/save_strategy is epoch and eval_strategy steps/);
    expect(mistake('early_stopping_threshold: 1\neval_strategy: epoch')).toMatch(/needs early_stopping_patience/);
    expect(mistake('metric_for_best_model: f1')).toMatch(/must be one of loss, eval_loss, mean_token_accuracy/);
  });

  it('LoRA+ is of LoRA', () => {
    expect(resolve('loraplus_lr_ratio: 16').config.loraplus_lr_ratio).toBe(16);
    expect(mistake('loraplus_lr_ratio: 16\nia3: {}')).toMatch(/needs the section lora/);
  });

  it('4 bits: nf4 with double quantisation, which is told where it was not asked for', () => {
    const asked = resolve('load_in_4bit: true\nbnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: true');
    expect(asked.config).toMatchObject({ load_in_4bit: true, bnb_4bit_quant_type: 'nf4' });
    expect(asked.notes).toEqual([]);
    expect(resolve('load_in_4bit: true\nbnb_4bit_compute_dtype: bfloat16').notes).toEqual([
      'bnb_4bit_compute_dtype changes nothing here: sums are in float32, and activations are what `dtype` says',
      '4-bit scales are quantised too (bnb_4bit_use_double_quant: true), which bitsandbytes does when told',
    ]);
    expect(resolve('load_in_4bit: false').config.load_in_4bit).toBe(false);
    expect(mistake('load_in_4bit: true\nbnb_4bit_quant_type: fp4')).toMatch(
      /bnb_4bit_quant_type must be nf4, not "fp4"/,
    );
    expect(mistake('bnb_4bit_use_double_quant: false')).toMatch(/must be true: scales are always quantised again here/);
  });

  it('DoRA, starts and whole modules, and which exclude each other', () => {
    const { config } = resolve('lora: {use_dora: true, init_lora_weights: gaussian, modules_to_save: [lm_head]}');
    expect(config.lora).toMatchObject({ use_dora: true, init_lora_weights: 'gaussian', modules_to_save: ['lm_head'] });
    for (const init of ['orthogonal', 'pissa', 'pissa_niter_16', 'olora', 'loftq']) {
      expect(resolve(`lora: {init_lora_weights: ${init}}`).config.lora?.init_lora_weights).toBe(init);
    }
    const loftq = 'lora: {init_lora_weights: loftq, loftq_config: {loftq_bits: 4}}';
    expect(resolve(loftq).config.lora?.loftq_config).toEqual({ loftq_bits: 4 });
    expect(mistake(`${loftq}\nload_in_4bit: true`)).toMatch(/run\.yaml:2: init_lora_weights: loftq stores the linear/);
    expect(mistake('lora: {loftq_config: {loftq_iter: 1}}')).toMatch(/loftq_config needs init_lora_weights: loftq/);
    expect(mistake('lora: {loftq_config: {loftq_iter: 5}}')).toMatch(/loftq_config must be a map with/);
    const eva = resolve('lora: {init_lora_weights: eva, eva_config: {rho: 1, whiten: true}}').config.lora;
    expect(eva).toMatchObject({ init_lora_weights: 'eva', eva_config: { rho: 1, whiten: true } });
    expect(mistake('lora: {eva_config: {rho: 1}}')).toMatch(/eva_config needs init_lora_weights: eva/);
    expect(mistake('lora: {init_lora_weights: eva, eva_config: {rho: 0.5}}')).toMatch(/eva_config/);
    expect(mistake('lora: {use_dora: true, init_lora_weights: olora}')).toMatch(/are both set/);
    expect(mistake('lora: {r: 3, init_lora_weights: orthogonal}')).toMatch(/needs even ranks, not 3/);
    expect(mistake('lora: {init_lora_weights: pissa_niter_}')).toMatch(
      /must be true, false, gaussian, orthogonal, pissa/,
    );
  });

  it('takes inactive values of the same keys, such as those of adapter_config.json', () => {
    const { notes } = resolve(`
packing: false
load_in_4bit: false
neftune_noise_alpha: null
early_stopping_patience: 0
trust_remote_code: false
device_map: auto
attn_implementation: flash_attention_2
gradient_checkpointing_kwargs: {use_reentrant: false}
lora: {task_type: CAUSAL_LM, use_dora: false, loftq_config: {}, megatron_core: megatron.core, modules_to_save: null, inference_mode: true}
`);
    expect(notes).toContain('attn_implementation changes nothing here: flash attention is always on');
    expect(notes).toContain(
      'device_map changes nothing here: the whole model runs on one adapter; `device` chooses it',
    );
    expect(notes).toHaveLength(6);
  });

  it('lists all mistakes at once', () => {
    const text = mistake('learning_rat: 1\nseed: x\nlora: {r: 0}', ['foo=1', 'epochs=zero']);
    expect(text).toMatch(/^the run has 5 mistakes:\n/);
    expect(text).toContain('on the command line: num_train_epochs must be a number above 0, not "zero"');
  });

  it.each([
    ['a: [1', /run\.yaml:1:\d+: not valid YAML/],
    ['seed: 1\nseed: 2', /run\.yaml:2:1: not valid YAML: Map keys must be unique/],
    ['- 1', /holds keys and values, not \[1\]/],
    ['just words', /holds keys and values, not "just words"/],
    ['seed: *x', /run\.yaml(:\d+:\d+)?: .*alias/i],
  ])('%s', (text, pattern) => expect(mistake(text)).toMatch(pattern));

  it('a bomb of aliases does not go off', () => {
    let text = 'a0: &a0 [x, x, x, x, x, x, x, x, x]\n';
    for (let i = 1; i < 9; i++) text += `a${i}: &a${i} [${Array.from({ length: 9 }, () => `*a${i - 1}`).join(', ')}]\n`;
    const start = performance.now();
    expect(mistake(text)).toMatch(/the aliases \(\*name\) cannot be resolved/);
    expect(performance.now() - start).toBeLessThan(2000);
  });

  it.each(['nothing', '=1', 'a b=1', '--x=1'])('%j is no override', (override) => {
    expect(mistake('', [override])).toMatch(/is not of the form key=value/);
  });

  it('is a usage error with exit code 2, and a missing file says so', async () => {
    expect(() => resolve('x: 1')).toThrow(expect.objectContaining({ exitCode: 2 }));
    await expect(loadConfig('missing/run.yaml')).rejects.toThrow(
      'missing/run.yaml: cannot read the run file: there is no such file or folder',
    );
  });
});

describe('the section of the adapter', () => {
  it('is that of LoRA where none is given, and the only one that is resolved and shown', () => {
    expect(resolve('').config.lora?.r).toBe(8);
    const { config } = resolve('ia3:\n  feedforward_modules: [down_proj]');
    expect(config.ia3).toEqual({
      target_modules: null,
      exclude_modules: null,
      modules_to_save: null,
      feedforward_modules: ['down_proj'],
      init_ia3_weights: true,
    });
    expect(config).not.toHaveProperty('lora');
    const shown = dumpConfig(config);
    expect(shown).toContain('ia3:\n  feedforward_modules:\n    - down_proj\n  init_ia3_weights: true\n');
    expect(shown).not.toContain('lora');
    expect(resolve(shown).config).toEqual(config);
  });

  it.each([
    ['ln_tuning:', 'ln_tuning'],
    ['ln_tuning: {}', 'ln_tuning'],
    ['ln_tuning.target_modules: [norm]', 'ln_tuning'],
    ['bottleneck: {peft_type: BOTTLENECK}', 'bottleneck'],
    ['lora:', 'lora'],
  ])('%s', (text, section) => {
    const { config } = resolve(text);
    expect(adapterSections.filter((name) => config[name] !== undefined)).toEqual([section]);
    expect(resolve(dumpConfig(config)).config).toEqual(config);
  });

  it('takes keys on the command line, which can drop the section of the file', () => {
    expect(resolve('', ['ia3.target_modules=ALL-LINEAR']).config.ia3?.target_modules).toBe('all-linear');
    expect(resolve('lora: {r: 4}', ['lora.r=8']).config.lora?.r).toBe(8);
    const { config, given } = resolve('lora: {r: 4}', ['lora=', 'ia3={}']);
    expect(config.ia3).toBeDefined();
    expect(config).not.toHaveProperty('lora');
    expect([...given]).toEqual([]);
    expect(resolve('lora: {r: 4}', ['lora=']).config.lora?.r).toBe(8);
  });

  it.each([
    ['lora: {r: 4}\nia3: {}', [], /run\.yaml:2: lora and ia3 are both given, and a run trains one adapter; keep one$/],
    ['lora: {r: 4}', ['ia3.init_ia3_weights=false'], /on the command line: lora and ia3 are .* \(lora= on the command/],
    [
      'ia3: {feed_forward_modules: a}',
      [],
      /unknown key "ia3.feed_forward_modules"; did you mean ia3.feedforward_modules/,
    ],
    ['ln_tuning: {r: 8}', [], /run\.yaml:1: unknown key "ln_tuning.r"; did you mean lora\.r/],
    ['ia3: 3', [], /ia3 must be a map with the keys of adapter_config\.json, not 3/],
    ['ia3: {fan_in_fan_out: true}', [], /not supported yet/],
    ['bottleneck: {kind: houlsbi}', [], /bottleneck\.kind must be houlsby, pfeiffer or parallel, not "houlsbi"/],
    ['bottleneck: {kind: pfeiffer, output_adapter: false}', [], /there is no place for an adapter/],
    ['prompt_tuning: {prompt_tuning_init: TEXT}', [], /prompt_tuning_init_text belong together/],
    ['prompt_tuning: {prompt_tuning_init_text: a}', [], /prompt_tuning_init_text belong together/],
    ['prefix_tuning: {encoder_hidden_size: 8}', [], /needs prefix_projection: true/],
    ['bottleneck: {reduction_factor: 0}', [], /bottleneck\.reduction_factor must be a number above 0/],
  ] as const)('%s %j is refused', (text, overrides, pattern) => expect(mistake(text, [...overrides])).toMatch(pattern));

  it('takes the sizes that a file of virtual tokens has, and says that the model has them', () => {
    const { config, notes } = resolve(
      'prefix_tuning: {prefix_projection: true, encoder_hidden_size: 8, token_dim: 1024, num_layers: 32}',
    );
    expect(config.prefix_tuning).toMatchObject({ num_virtual_tokens: 20, encoder_hidden_size: 8 });
    expect(notes).toEqual([
      'prefix_tuning.token_dim changes nothing here: the model says it',
      'prefix_tuning.num_layers changes nothing here: the model says it',
    ]);
  });

  it('a bottleneck has the defaults of its kind', () => {
    const { bottleneck } = resolve('bottleneck: {kind: parallel, scaling: 2}').config;
    expect(bottleneck).toMatchObject({ is_parallel: true, reduction_factor: 2, scaling: 2, init_weights: 'near_zero' });
    expect(resolve('bottleneck:').config.bottleneck).toMatchObject({ kind: 'houlsby', reduction_factor: 16 });
  });

  it('a run cannot go on with another one', () => {
    const [lora, ia3] = ['', 'ia3: {}'].map((text) => resolve(text).config);
    expect(compareConfigs({ ...lora }, ia3).refused[0]).toBe('the adapter is that of ia3 but was that of lora');
    expect(compareConfigs({ ...ia3, ia3: {} }, ia3)).toEqual({ refused: [], allowed: [] });
    expect(compareConfigs({ ...ia3 }, resolve('ia3: {init_ia3_weights: false}').config).refused).toEqual([
      'ia3.init_ia3_weights is false but was true',
    ]);
  });

  it('is in the guide as it is here', async () => {
    const guide = await readFile(new URL('../../../docs/methods.md', import.meta.url), 'utf8');
    const blocks = [...guide.matchAll(/^```yaml\n(.*?)^```$/gms)].map(([, block = '']) => block);
    expect(blocks.length).toBeGreaterThan(2);
    for (const block of blocks) expect(resolve(block).notes).toEqual([]);
    for (const name of adapterSections) expect(guide).toContain(`| \`${name}\` |`);
  });

  it('all keys are in the help, with their defaults', () => {
    const standard = new Map(configKeys().map(({ key, standard }) => [key, standard]));
    expect(standard.get('lora.r')).toBe('8');
    expect(standard.get('ia3.init_ia3_weights')).toBe('true');
    expect(standard.get('bottleneck.non_linearity')).toBe('"swish"');
  });
});

it('a checkpoint from before a key, of a section too, has it at its default', () => {
  const { use_dora: _dora, modules_to_save: _whole, ...lora } = { ...resolve('').config.lora };
  const { gradient_checkpointing: _checkpointing, ...before } = { ...resolve('').config, lora };
  expect(compareConfigs(before, resolve('').config)).toEqual({ refused: [], allowed: [] });
  expect(compareConfigs(before, resolve('lora: {use_dora: true}').config).refused).toEqual([
    'lora.use_dora is true but was false',
  ]);
});

describe('dumpConfig', () => {
  it('writes what resolves to the same again', () => {
    const { config } = resolve(recipe);
    expect(resolve(dumpConfig(config)).config).toEqual(config);
    expect(resolve(dumpConfig(resolveConfig({}).config)).config).toEqual(resolveConfig({}).config);
    expect(resolve(dumpConfig(resolve('report_to: none').config)).config.report_to).toEqual([]);
    const validated = resolve('validation_file: v.jsonl').config;
    expect(resolve(dumpConfig(validated)).config).toEqual(validated);
  });

  it('survives any text in it', () => {
    fc.assert(
      fc.property(fc.string({ minLength: 1, unit: 'binary' }), (text) => {
        const before: Config = { ...resolveConfig({}).config, prompt_template: text };
        expect(resolve(dumpConfig(before)).config).toEqual(before);
      }),
      { numRuns: 30 },
    );
  });
});
