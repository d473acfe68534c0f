import { type ByteFolder, FormatError, LorikeetError } from '@lorikeet/tensor';
import { fuzzReader, fuzzSource, MemoryFolder, mutateBytes, mutateJson, type Mutator } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { loraConfig } from './format.js';
import { type LoraFile, readLoraFile, writeLoraFile } from './lora-file.js';
import './methods/bottleneck.js';
import './methods/ia3.js';
import './methods/ln-tuning.js';
import './methods/lora.js';
import './methods/prefix-tuning.js';
import './methods/prompt-tuning.js';
import { readMlxAdapter, writeMlxAdapter } from './mlx.js';
import { compileNamePattern } from './name-pattern.js';
import { parsePeftConfig } from './peft-method.js';

const json = (value: object): Uint8Array => new TextEncoder().encode(JSON.stringify(value));
const textOf = (file: Uint8Array): string => new TextDecoder().decode(file);

const lora = { r: 2, target_modules: ['q_proj'], rank_pattern: { '.*k_proj': 4 }, layers_to_transform: [0, 1] };

it('adapter_config.json of every method: changed ones are refused, or are the same after another reading', async () => {
  const { extra: _, ...own } = loraConfig(lora);
  const report = await fuzzReader({
    seeds: [
      json(own),
      json({ peft_type: 'IA3', target_modules: '.*_proj', feedforward_modules: ['down_proj'] }),
      json({ peft_type: 'LN_TUNING', target_modules: ['norm'], modules_to_save: null }),
      json({ peft_type: 'PROMPT_TUNING', num_virtual_tokens: 4, token_dim: 8, num_layers: 2 }),
      json({ peft_type: 'PREFIX_TUNING', num_virtual_tokens: 4, prefix_projection: true, encoder_hidden_size: 8 }),
      // AdapterHub's, which has no peft_type.
      json({ name: 'task', config: { mh_adapter: true, reduction_factor: 4, leave_out: [] }, hidden_size: 8 }),
    ],
    mutate: mutateJson,
    errors: [LorikeetError],
    read: (file) => parsePeftConfig(textOf(file)),
    check(config) {
      expect(typeof config.peft_type).toBe('string');
    },
  });
  expect(report.accepted).toBeGreaterThan(0.1 * report.refused);
  expect(report.refused).toBeGreaterThan(0.3 * report.accepted);
});

describe('adapters as files', () => {
  const config = loraConfig({ r: 2, lora_alpha: 4, target_modules: ['q_proj'], use_dora: true });
  const values = (size: number): Float32Array => Float32Array.from({ length: size }, (_, i) => i / 8 - 1);
  const path = 'model.layers.0.self_attn.q_proj';
  const update = { path, r: 2, inputs: 3, outputs: 4, scaling: 2, A: values(6), B: values(8), magnitude: values(4) };

  function checkUpdates({ updates }: LoraFile): void {
    for (const { r, inputs, outputs, scaling, A, B, magnitude } of updates) {
      const sizes = [A.length, B.length, magnitude?.length ?? outputs];
      if (sizes.join() !== [r * inputs, outputs * r, outputs].join())
        throw new Error(`parts of ${sizes.join()} values`);
      if (!Number.isFinite(scaling)) throw new Error(`a scaling of ${scaling}`);
    }
  }

  /** Fuzzes the files of a folder that is put together into one, the configuration first, a zero byte between. */
  async function fuzzFolder(
    names: readonly [config: string, weights: string],
    files: ReadonlyMap<string, Uint8Array>,
    read: (folder: ByteFolder) => Promise<LoraFile>,
  ): Promise<{ accepted: number; refused: number }> {
    const [text, weights] = names.map((name) => files.get(name) ?? new Uint8Array(0));
    const mutate: Mutator = (file, step, seeds) => {
      const inner = { ...step, kind: step.kind >> 1 };
      const end = file.indexOf(0);
      if (step.kind % 2 === 0 || end < 0) return mutateBytes(file, inner, seeds);
      const changed = mutateJson(file.subarray(0, end), inner, [text]);
      return Uint8Array.from([...changed.filter((byte) => byte !== 0), ...file.subarray(end)]);
    };
    return fuzzReader({
      seeds: [Uint8Array.from([...text, 0, ...weights])],
      mutate,
      errors: [LorikeetError],
      read(file) {
        const end = file.indexOf(0) < 0 ? file.length : file.indexOf(0);
        const parts = new Map([
          [names[0], file.subarray(0, end)],
          [names[1], file.subarray(end + 1)],
        ]);
        return read({
          name: 'folder',
          open: (name) => {
            const bytes = parts.get(name);
            return Promise.resolve(bytes === undefined ? undefined : fuzzSource(bytes, name));
          },
        });
      },
      check: checkUpdates,
    });
  }

  it('of PEFT: changed ones are refused, or every part has its size', async () => {
    const folder = new MemoryFolder();
    await writeLoraFile(folder, { config, updates: [update] });
    const names = ['adapter_config.json', 'adapter_model.safetensors'] as const;
    const report = await fuzzFolder(names, folder.files, readLoraFile);
    expect(report.accepted).toBeGreaterThan(0.05 * report.refused);
    expect(report.refused).toBeGreaterThan(report.accepted);
  });

  it('of mlx-lm: the same', async () => {
    const folder = new MemoryFolder();
    await writeMlxAdapter(folder, { config, updates: [update] }, 1);
    const report = await fuzzFolder(['adapter_config.json', 'adapters.safetensors'], folder.files, readMlxAdapter);
    expect(report.accepted).toBeGreaterThan(0.05 * report.refused);
    expect(report.refused).toBeGreaterThan(report.accepted);
  });
});

it('name patterns: changed ones are refused, or answer soon', async () => {
  const names = ['model.layers.0.self_attn.q_proj', 'a'.repeat(60), '', 'model.layers.10.mlp.down_proj'];
  const report = await fuzzReader({
    seeds: ['.*\\.(q|v)_proj', '^model\\.layers\\.[0-9]+\\.(?!mlp)[^.]+\\.\\w{1,8}$', '(a+)+b', '(?P<x>a|a?)*c'].map(
      (text) => new TextEncoder().encode(text),
    ),
    errors: [FormatError],
    read(file) {
      const matches = compileNamePattern(textOf(file));
      return names.map((name) => matches(name));
    },
  });
  expect(report.accepted).toBeGreaterThan(0.1 * report.refused);
  expect(report.refused).toBeGreaterThan(0.1 * report.accepted);
});
