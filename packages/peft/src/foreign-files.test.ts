/** Files of other tools: what they hold goes through load and save unchanged. */
import {
  type ByteFolder,
  decodeFloats,
  encodeFloats,
  memorySink,
  memorySource,
  openSafetensors,
  parseJsonObject,
  writeSafetensors,
} from '@lorikeet/tensor';
import { MemoryFolder, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { move } from '../test/method-checks.js';
import { MethodNet } from '../test/method-net.js';
import { createAdapter } from './create-adapter.js';
import { loadAdapter } from './load-adapter.js';
import { type AdapterConfig, loraConfig } from './format.js';
import { readLoraFile } from './lora-file.js';
import { bottleneckConfig } from './methods/bottleneck.js';
import { ia3Config } from './methods/ia3.js';
import { lnTuningConfig } from './methods/ln-tuning.js';
import './methods/lora.js';

const device = await testDevice();
const low = { r: 2, target_modules: ['up_proj', 'down_proj'] };

/** The same adapter as another tool writes it: weights of a 16-bit type, and a setting that is not known here. */
async function foreign(own: MemoryFolder, dtype: 'F16' | 'BF16'): Promise<MemoryFolder> {
  const other = new MemoryFolder();
  for (const [name, bytes] of own.files) {
    const sink = await other.create(name);
    if (name.endsWith('.safetensors')) {
      const file = await openSafetensors(memorySource(bytes));
      const entries = [];
      for (const [key, { shape }] of file.tensors) {
        entries.push({ name: key, dtype, shape, data: encodeFloats(await file.readFloats(key), dtype).bytes });
      }
      const memory = memorySink();
      await writeSafetensors(memory, entries);
      await sink.write(memory.bytes());
    } else {
      const object = parseJsonObject(new TextDecoder().decode(bytes), name);
      await sink.write(new TextEncoder().encode(JSON.stringify({ ...object, made_by: { tool: 'another', at: [1] } })));
    }
    await sink.close();
  }
  return other;
}

const text = (files: MemoryFolder, name: string): string => files.text(name);

describe.each<[string, AdapterConfig]>([
  ['LoRA', loraConfig(low)],
  ['DoRA', loraConfig({ ...low, use_dora: true })],
  ['LoRA and whole modules', loraConfig({ ...low, modules_to_save: ['lm_head', 'norm'] })],
  ['LoRA and token rows', loraConfig({ ...low, trainable_token_indices: [1, 3] })],
  ['(IA)^3', ia3Config({ target_modules: low.target_modules })],
  ['norm tuning', lnTuningConfig({ target_modules: ['norm'] })],
  ['bottleneck adapters', bottleneckConfig('pfeiffer', { reduction_factor: 4, name: 'task' })],
])('%s', (_, config) => {
  it.each(['F16', 'BF16'] as const)('%s: tensor bytes, key set and unknown settings are kept', async (dtype) => {
    const net = new MethodNet(device);
    const adapter = await createAdapter(net, config);
    await move(adapter);
    const own = new MemoryFolder();
    await adapter.save(own);
    adapter.remove();
    const given = await foreign(own, dtype);
    const loaded = await loadAdapter(net, given);
    const saved = new MemoryFolder();
    await loaded.save(saved);
    expect([...saved.files.keys()].sort()).toEqual([...given.files.keys()].sort());
    const weights = [...given.files.keys()].find((name) => name.endsWith('.safetensors')) ?? '';
    expect(Buffer.compare(saved.bytes(weights), given.bytes(weights))).toBe(0);
    const settings = (files: MemoryFolder): unknown => parseJsonObject(text(files, 'adapter_config.json'), 'config');
    expect(settings(saved)).toEqual(settings(given));

    // What is trained on has values that 16 bits do not hold.
    await move(loaded);
    await loaded.save(saved);
    const file = await openSafetensors(memorySource(saved.bytes(weights)));
    const [[key, parameter]] = loaded.parameters();
    expect(file.info(key).dtype).toBe('F32');
    expect(decodeFloats(await file.read(key), 'F32')).toEqual(Float32Array.from(await parameter.read()));
    net.dispose();
  });
});

it.each(['adapter_model.bin', 'pytorch_adapter.bin'])('%s is refused, with how to convert it', async (name) => {
  const net = new MethodNet(device);
  const adapter = await createAdapter(net, loraConfig(low));
  const folder = new MemoryFolder();
  await adapter.save(folder);
  adapter.remove();
  folder.files.delete('adapter_model.safetensors');
  folder.files.set(name, Uint8Array.of(0x80, 2));
  const message = `only "${name}": pickled weights, which are not read since they can run code. Convert them in that folder with PyTorch`;
  const listing: ByteFolder = {
    name: folder.name,
    open: (file) => folder.open(file),
    list: () => Promise.resolve([...folder.files.keys()]),
  };
  await expect(loadAdapter(net, listing)).rejects.toThrow(message);
  await expect(readLoraFile(listing)).rejects.toThrow(message);
  folder.files.delete(name);
  await expect(loadAdapter(net, listing)).rejects.toThrow(
    'there is no adapter_model.safetensors; is this an adapter folder?',
  );
  net.dispose();
});
