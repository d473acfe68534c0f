/** The commands one after the other, from a model folder to a merged model, on a small random model. */
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { matmul, scope } from '@lorikeet/tensor';
import { testDevice } from '@lorikeet/testing';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openCommandDevice } from '../src/session.js';
import { cli, tinyRows, tinyVocabSize, writeRows, writeTinyModel } from './tiny-model.js';

const device = await testDevice();
let folder: string;
const at = (...parts: string[]): string => join(folder, ...parts);
const text = (...parts: string[]): Promise<string> => readFile(at(...parts), 'utf8');
const json = async (...parts: string[]): Promise<Record<string, unknown>> => {
  const value: unknown = JSON.parse(await text(...parts));
  return Object.fromEntries(Object.entries(value ?? {}));
};
const lines = (out: string): Record<string, unknown>[] =>
  out
    .trim()
    .split('\n')
    .map((line) => {
      const value: unknown = JSON.parse(line);
      return Object.fromEntries(Object.entries(value ?? {}));
    });

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-run-'));
  await writeTinyModel(device, at('model'));
  await writeRows(at('train.jsonl'), tinyRows(48));
  await writeRows(at('test.jsonl'), tinyRows(9));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const run = (): string[] => [
  `model=${at('model')}`,
  `train_file=${at('train.jsonl')}`,
  `validation_file=${at('test.jsonl')}`,
  'prompt_template={prompt}<answer>{completion}<end>',
  'special_tokens.pad_token=<pad>',
  'special_tokens.additional_special_tokens=[<answer>, <end>]',
  'lora.r=8',
  'lora.lora_alpha=16',
  'lora.target_modules=all-linear',
  'per_device_train_batch_size=8',
  'learning_rate=2e-2',
  'logging_steps=6',
];

describe('train, eval, generate, merge and inspect', () => {
  it('cuts long kernels when asked to, to the same bits', async () => {
    const adapter = async (out: string, ...more: string[]): Promise<Buffer> => {
      const { code, err } = await cli(['train', ...run(), 'max_steps=2', `output_dir=${at(out)}`, ...more]);
      expect(err).not.toContain('error');
      expect(code).toBe(0);
      return readFile(at(out, 'adapter_model.safetensors'));
    };
    const whole = await adapter('whole');
    const cut = await adapter('cut', 'max_gflop_per_dispatch=0.00005');
    expect(cut.equals(whole)).toBe(true);
    const cutting = await openCommandDevice({ maxGflopPerDispatch: 1e-6 });
    scope(() => void matmul(cutting.zeros([64, 64]), cutting.zeros([64, 64])));
    expect(cutting.stats().dispatches).toBeGreaterThan(1);
    cutting.destroy();
  });

  it('trains: header, preview, log lines, evaluation before and after, and the files', async () => {
    const result = await cli(['train', ...run(), 'max_steps=36', `output_dir=${at('out')}`]);
    expect(result.err).not.toContain('error');
    expect(result.code).toBe(0);
    expect(result.out).toMatch(/trainable +[\d,]+ parameters, [\d.]+ % of all/);
    expect(result.out).toContain('<answer> <end>');
    expect(result.out).toContain('⟦up⟧⟪<end>⟫');
    expect(result.out).toMatch(
      /step 6\/36 {2}loss [\d.]+ {2}acc [\d.]+% {2}gnorm [\d.]+ {2}lr [\d.e-]+ {2}[\d,]+ tok\/s {2}peak [\d.]+ MB {2}eta (\d+m)?\d+s/,
    );
    for (const command of ['eval', 'generate', 'merge', 'inspect'])
      expect(result.out).toContain(`lorikeet ${command} `);

    const names = (await readdir(at('out'))).sort();
    expect(names).toEqual([
      'README.md',
      'adapter_config.json',
      'adapter_model.safetensors',
      'eval_results.json',
      'overview.json',
      'report.html',
      'run.json',
      'run.yaml',
      'special_tokens_map.json',
      'token_losses.json',
      'tokenizer.json',
      'tokenizer_config.json',
      'train_log.jsonl',
    ]);
    const { before, after } = await json('out', 'eval_results.json');
    expect(before).toMatchObject({ eval_loss: expect.any(Number) });
    const [first, last] = [before, after].map((value) => Number(Object(value)['eval_loss']));
    // Nothing of the answers is known before. With frozen rows the end could not be told from the two other new tokens:
    // its loss would stay at ln 3, and that of an answer with its end above 0.54.
    expect(first).toBeGreaterThan(2);
    expect(last).toBeLessThan(0.3);
    const log = lines(await text('out', 'train_log.jsonl'));
    expect(log.map((entry) => entry['step'])).toEqual([6, 12, 18, 24, 30, 36]);
    expect(await json('out', 'run.json')).toMatchObject({
      status: 'done',
      step: 36,
      seed: 42,
      model: { vocab_size: tinyVocabSize + 3 },
      data: { train_rows: 48, validation_rows: 9 },
    });
    const ids = [0, 1, 2].map((i) => tinyVocabSize + i);
    expect(await json('out', 'adapter_config.json')).toMatchObject({
      base_model_name_or_path: at('model'),
      trainable_token_indices: { embed_tokens: ids, lm_head: ids },
    });
    expect(await text('out', 'README.md')).toContain('library_name: peft');
  });

  it('measures: the loss that training saw, from the files alone, and the answers of both kinds', async () => {
    const { after } = await json('out', 'eval_results.json');
    const loss = Number(Object(after)['eval_loss']);
    const args = ['eval', '--model', at('model'), '--adapter', at('out'), '--data', at('test.jsonl'), '--json'];
    const free = await cli([...args, '--output', at('scores')]);
    expect(free.code).toBe(0);
    const [result] = lines(free.out);
    expect(Number(result['eval_loss'])).toBeCloseTo(loss, 5);
    expect(result).toMatchObject({ rows: 9, mode: 'generate', accuracy: 1, invalid: 0, macro_f1: 1 });
    expect(result['majority']).toMatchObject({ accuracy: 1 / 3 });
    expect(await json('scores', 'eval_results.json')).toEqual(result);
    const predictions = lines(await text('scores', 'predictions.jsonl'));
    expect(predictions.map((item) => item['prediction'])).toEqual(tinyRows(9).map((row) => row.completion));

    const generation = at('model', 'generation_config.json');
    const before = await readFile(generation);
    await writeFile(generation, '{"repetition_penalty": 1.2}');
    const scored = await cli([...args, '--labels', 'down,flat,up']);
    await writeFile(generation, before);
    expect(scored.err).toContain('repetition_penalty: 1.2; labels are answered without it');
    expect(free.err).not.toContain('repetition_penalty');
    expect(scored.code).toBe(0);
    expect(lines(scored.out)[0]).toMatchObject({ mode: 'labels', accuracy: 1, labels: ['down', 'flat', 'up'] });
    expect(scored.err).toContain('right \\ answered');
  });

  it('counts answers that are no label as invalid and never as a class', async () => {
    const result = await cli([
      'eval',
      '--model',
      at('model'),
      '--data',
      at('test.jsonl'),
      '--max-new-tokens',
      '4',
      '--json',
    ]);
    expect(result.code).toBe(0);
    expect(lines(result.out)[0]).toMatchObject({ accuracy: 0, invalid: 9, invalid_share: 1, weighted_f1: 0 });
  });

  it('generates from the command line and from stdin, the same either way', async () => {
    const args = ['generate', '--model', at('model'), '--adapter', at('out'), '--temperature', '0'];
    const plain = await cli([...args, '--prompt', 'Sales fell in 2003<answer>']);
    expect(plain).toMatchObject({ code: 0, out: 'down\n' });
    const piped = await cli([...args, '--prompt', '-', '--json'], { stdin: 'Sales fell in 2003<answer>\n' });
    expect(lines(piped.out)[0]).toMatchObject({ text: 'down', finish: 'eos' });
    const sampled = async (seed: string): Promise<string> =>
      (await cli(['generate', '--model', at('model'), '--prompt', 'S', '--max-new-tokens', '12', '--seed', seed])).out;
    expect(await sampled('1')).toBe(await sampled('1'));
    expect(await sampled('1')).not.toBe(await sampled('2'));
  });

  it('names targets that no module has, and keys of an adapter that nothing heeds', async () => {
    const trained = await cli([
      'train',
      ...run(),
      'lora.target_modules=[q_proj, wq]',
      'max_steps=1',
      `output_dir=${at('noted')}`,
    ]);
    expect(trained.err).toContain('target_modules: the model has no module wq; the others are adapted');
    const path = at('noted', 'adapter_config.json');
    await writeFile(path, (await readFile(path, 'utf8')).replace('{', '{ "my_note": 1,'));
    const used = await cli(['generate', '--model', at('model'), '--adapter', at('noted'), '--prompt', 'S']);
    expect(used.err).toContain('adapter_config.json has keys that nothing here heeds: my_note');
  });

  it('merges: the same logits after reading it again, the new vocabulary, and the same loss without the adapter', async () => {
    const merged = await cli([
      'merge',
      '--model',
      at('model'),
      '--adapter',
      at('out'),
      '--output',
      at('merged'),
      '--verify',
      '--json',
    ]);
    expect(merged.code).toBe(0);
    const [report] = lines(merged.out);
    expect(report).toMatchObject({ dtype: 'F32', vocab_size: tinyVocabSize + 3, verification: { argmax_flips: 0 } });
    expect(Number(Object(report['verification'])['max_logit_difference'])).toBeLessThan(1e-3);
    expect(await json('merged', 'config.json')).toMatchObject({ vocab_size: tinyVocabSize + 3 });
    expect(await readdir(at('merged'))).toEqual(expect.arrayContaining(['tokenizer.json', 'generation_config.json']));
    const again = await cli([
      'eval',
      '--model',
      at('merged'),
      '-c',
      at('out', 'run.yaml'),
      '--data',
      at('test.jsonl'),
      '--json',
    ]);
    const { after } = await json('out', 'eval_results.json');
    expect(Number(lines(again.out)[0]['eval_loss'])).toBeCloseTo(Number(Object(after)['eval_loss']), 4);
    const second = await cli(['merge', '--model', at('model'), '--adapter', at('out'), '--output', at('merged')]);
    expect(second.code).toBe(1);
    expect(second.err).toContain('this folder is not empty');
  });

  it('inspects the adapter and the merged model', async () => {
    const adapter = await cli(['inspect', at('out')]);
    expect(adapter).toMatchObject({ code: 0 });
    expect(adapter.out).toContain('q_proj');
    expect(await cli(['inspect', at('model'), at('merged')])).toMatchObject({ code: 0 });
  });

  it('does not replace a run silently', async () => {
    const before = await text('out', 'run.json');
    const refused = await cli(['train', ...run(), 'max_steps=1', `output_dir=${at('out')}`]);
    expect(refused.code).toBe(1);
    expect(refused.err).toMatch(/out: this output_dir holds another run .*--overwrite/);
    expect(await text('out', 'run.json')).toBe(before);
    const model = await cli(['train', ...run(), 'max_steps=1', `output_dir=${at('model')}`, '--overwrite']);
    expect(model.err).toContain('holds a model');
  });

  it('stops at Ctrl-C after the running steps, saves the adapter and exits with 130', async () => {
    const listeners = new Set<() => void>();
    const signals = {
      on: (_event: string, listener: () => void) => listeners.add(listener),
      off: (_event: string, listener: () => void) => listeners.delete(listener),
      exit: () => undefined,
    };
    let pressed = false;
    const result = await cli(
      ['train', ...run(), 'max_steps=500', 'logging_steps=1', `output_dir=${at('stopped')}`, '--json'],
      {
        signals,
        onOut: (out) => {
          if (pressed || !out.includes('"step":2,')) return;
          pressed = true;
          for (const listener of listeners) listener();
        },
      },
    );
    expect(result.code).toBe(130);
    const record = await json('stopped', 'run.json');
    expect(record).toMatchObject({ status: 'interrupted', total_steps: 500 });
    const step = Number(record['step']);
    expect(step).toBeLessThan(8);
    expect(result.err).toContain(`stopped after step ${step} of 500; the adapter as it is now lies in`);
    expect(lines(result.out).map((item) => item['event'])).toContain('interrupted');
    expect(await readdir(at('stopped'))).toContain('adapter_model.safetensors');
  });
});
