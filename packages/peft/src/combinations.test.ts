/** What parts of this package do together that know nothing of one another: starts, methods, storage, sets and files. */
import type { CalibrationBatch } from '@lorikeet/nn';
import { MemoryFolder, relativeError, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { AttentionNet } from '../test/attention-net.js';
import { move } from '../test/method-checks.js';
import { MethodNet, type Storage } from '../test/method-net.js';
import { TinyModel, vocab } from '../test/tiny-model.js';
import { AdapterSet } from './adapter-set.js';
import { createAdapter, injectAdapter } from './create-adapter.js';
import { type AdapterConfig, loraConfig } from './format.js';
import { loadAdapter } from './load-adapter.js';
import { readLoraFile } from './lora-file.js';
import { prefixTuningConfig } from './methods/prefix-tuning.js';
import { promptTuningConfig } from './methods/prompt-tuning.js';
import { doraSpectrum, loraSpectrum } from './spectrum.js';
import './methods/lora.js';

const device = await testDevice();
const live = (): number => device.stats().liveBytes;
const low = { r: 2, lora_alpha: 6, target_modules: ['up_proj', 'down_proj'] };

/** The net's own batch, all positions trained. */
function batchOf(net: MethodNet): CalibrationBatch {
  return { labels: net.labels, real: net.labels.map(() => 1), forward: () => void net.logits() };
}

describe.each([
  ['LoRA', 'f32', false],
  ['LoRA', 'nf4', false],
  ['DoRA', 'f32', true],
  ['DoRA', 'nf4', true],
] as const satisfies readonly (readonly [string, Storage, boolean])[])('EVA, %s over %s', (_, storage, use_dora) => {
  it('starts as a no-op, is read back to the bit, and its spectra are those of what it adds', async () => {
    const net = new MethodNet(device, storage);
    const base = await net.readLogits();
    const own = live();
    const config = loraConfig({ ...low, use_dora, init_lora_weights: 'eva', eva_config: { use_label_mask: false } });
    const adapter = await createAdapter(net, config, { data: [batchOf(net)] });
    expect(relativeError(await net.readLogits(), base)).toBeLessThan(1e-6);
    await move(adapter);
    const logits = await net.readLogits();
    expect(relativeError(logits, base)).toBeGreaterThan(1e-3);
    const norms = await adapter.updateNorms();
    const folder = new MemoryFolder();
    await adapter.save(folder);
    adapter.remove();
    expect([await net.readLogits(), live()]).toEqual([base, own]);

    const { updates } = await readLoraFile(folder);
    expect(updates.map(({ path }) => path).sort()).toEqual([...norms.keys()].sort());
    for (const update of updates) {
      const [, weight] = [...net.at(update.path).namedParameters()][0];
      const { norm } = use_dora ? await doraSpectrum(weight, update) : loraSpectrum(update);
      expect(norm / (norms.get(update.path) ?? 0), update.path).toBeCloseTo(1, 5);
    }
    const again = await loadAdapter(net, folder);
    expect(await net.readLogits()).toEqual(logits);
    again.remove();
    net.dispose();
  });
});

describe('a set', () => {
  it('has rows of adapters that started from the weights and from nothing', async () => {
    const model = new TinyModel(device);
    const ids = [0, 3, 10];
    const set = new AdapterSet(model);
    const configs: Readonly<Record<string, AdapterConfig>> = {
      pissa: loraConfig({ r: 3, target_modules: ['q_proj'], init_lora_weights: 'pissa' }),
      plain: loraConfig({ r: 2, target_modules: ['q_proj'] }),
    };
    const alone: number[][] = [];
    for (const [name, config] of Object.entries(configs)) {
      await move(await set.add(name, config));
      set.activate(name);
      alone.push(await model.readLogits(ids));
    }
    const found = await set.rows(['pissa', 'plain', null], () => model.readLogits(ids));
    const rows = (of: readonly number[], row: number): number[] => of.slice(row * vocab, (row + 1) * vocab);
    const base = await set.disabled(() => model.readLogits(ids));
    for (const [row, truth] of [alone[0], alone[1], base].entries()) {
      expect(relativeError(rows(found, row), rows(truth, row))).toBeLessThan(1e-5);
    }
    set.dispose();
    model.dispose();
  });

  it('swaps virtual tokens and updates of weights, which compute together too, but not two of virtual tokens', async () => {
    const net = new AttentionNet(device);
    const base = await net.readLogits();
    const own = live();
    const configs: Readonly<Record<string, AdapterConfig>> = {
      prompt: promptTuningConfig({ num_virtual_tokens: 3 }),
      prefix: prefixTuningConfig({ num_virtual_tokens: 2, prefix_projection: true }),
      lora: loraConfig({ r: 2, target_modules: ['q_proj'] }),
    };
    const set = new AdapterSet(net);
    for (const [name, config] of Object.entries(configs)) await move(await set.add(name, config));
    const bytes = live();
    for (const name of ['lora', 'prompt', 'prefix', 'prompt', 'lora']) {
      set.activate(name);
      const other = new AttentionNet(device);
      await move(injectAdapter(other, configs[name]));
      expect(await net.readLogits(), name).toEqual(await other.readLogits());
      other.dispose();
      expect(await set.disabled(() => net.readLogits()), name).toEqual(base);
    }
    expect(live()).toBe(bytes);

    set.activate(['prompt', 'lora']);
    const both = await net.readLogits();
    const merged = new AttentionNet(device);
    const first = injectAdapter(merged, configs['lora']);
    await move(first);
    first.mergeAndUnload();
    await move(injectAdapter(merged, configs['prompt']));
    expect(relativeError(both, await merged.readLogits())).toBeLessThan(1e-5);
    merged.dispose();
    expect(() => set.activate(['prompt', 'prefix'])).toThrow('there is no sum at virtual_tokens');
    expect(await net.readLogits()).toEqual(both);
    set.dispose();
    expect([await net.readLogits(), live()]).toEqual([base, own]);
    net.dispose();
  });

  it('saves an adapter that is active, waits, adds up with another, or is merged: always the same bytes', async () => {
    const net = new MethodNet(device);
    const set = new AdapterSet(net);
    const adapter = await set.add(
      'one',
      loraConfig({ ...low, init_lora_weights: 'pissa', modules_to_save: ['lm_head'] }),
    );
    await move(adapter);
    await move(await set.add('two', loraConfig(low)));
    const saved = async (): Promise<ReadonlyMap<string, Uint8Array>> => {
      const folder = new MemoryFolder();
      await set.get('one').save(folder);
      return folder.files;
    };
    const files = await saved();
    set.activate(['one', 'two']);
    expect(await saved()).toEqual(files);
    set.activate('two');
    expect(await saved()).toEqual(files);
    set.activate('one');
    const logits = await net.readLogits();
    adapter.merge();
    expect(await saved()).toEqual(files);
    adapter.unmerge();
    expect(await net.readLogits()).toEqual(logits);
    const other = new MethodNet(device);
    await loadAdapter(other, new MemoryFolder(files));
    expect(relativeError(await other.readLogits(), logits)).toBeLessThan(1e-5);
    other.dispose();
    set.dispose();
    net.dispose();
  });

  it('goes on from a checkpoint of an adapter that waits', async () => {
    const config = prefixTuningConfig({ num_virtual_tokens: 2, prefix_projection: true });
    const net = new AttentionNet(device);
    const adapter = injectAdapter(net, config);
    await move(adapter);
    const logits = await net.readLogits();
    adapter.park();
    const folder = new MemoryFolder();
    await adapter.save(folder, { resumable: true });
    adapter.remove();
    const next = injectAdapter(net, config, { seed: 7 });
    next.park();
    await next.load(folder);
    next.resume();
    expect(await net.readLogits()).toEqual(logits);
    next.remove();
    net.dispose();
  });

  it('keeps its adapters until it hands one over, which is merged for good', async () => {
    const net = new MethodNet(device);
    const set = new AdapterSet(net);
    await move(await set.add('one', loraConfig(low)));
    await set.add('two', loraConfig(low));
    const logits = await net.readLogits();
    for (const names of ['one', ['one', 'two'], 'two']) {
      set.activate(names);
      expect(() => set.get('one').remove()).toThrow('is in a set; delete(name) of the set frees it');
    }
    set.activate('one');
    expect(() => set.get('one').mergeAndUnload()).toThrow('is in a set');
    set.activate(['one', 'two']);
    const one = set.release('one');
    expect([set.names, set.active, one.parked]).toEqual([['two'], ['two'], true]);
    set.dispose();
    one.resume();
    one.mergeAndUnload();
    expect(relativeError(await net.readLogits(), logits)).toBeLessThan(1e-5);
    net.dispose();
  });
});

it('an adapter that cannot be merged whole is not merged in parts', async () => {
  const net = new AttentionNet(device);
  const adapter = injectAdapter(
    net,
    promptTuningConfig({ num_virtual_tokens: 2, trainable_token_indices: [1], modules_to_save: ['lm_head'] }),
  );
  await move(adapter);
  const logits = await net.readLogits();
  const bytes = live();
  for (const call of [(): void => adapter.merge(), (): void => adapter.mergeAndUnload()]) {
    expect(call).toThrow('cannot be merged into weights');
    expect([await net.readLogits(), live()]).toEqual([logits, bytes]);
  }
  adapter.remove();
  net.dispose();
});
