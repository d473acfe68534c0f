/** Loads that fail on the way. */
import { InitWeights } from '@lorikeet/nn';
import { openCheckpoint } from '@lorikeet/tensor';
import { MemoryFolder, testDevice } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import { mistralConfig, parseMistralConfig } from './config.js';
import { loadMistral, type LoadOptions } from './load.js';
import { Mistral } from './model.js';
import { saveMistral } from './save.js';

const device = await testDevice();

it.each<[string, boolean, LoadOptions]>([
  ['f16', false, {}],
  ['f32 with new rows', false, { dtype: 'f32', vocabSize: 64 }],
  ['quantised on the way', false, { quantization: 'nf4' }],
  ['in 4 bits', true, {}],
  ['restored from 4 bits', true, { quantization: 'none' }],
])('%s: a load that fails, at whichever read, leaves nothing on the device', async (_, fourBit, options) => {
  const config = mistralConfig({
    vocab_size: 61,
    hidden_size: 64,
    intermediate_size: 72,
    num_hidden_layers: 1,
    num_attention_heads: 4,
    num_key_value_heads: 2,
  });
  const { liveBytes } = device.stats();
  const folder = new MemoryFolder();
  const whole = await Mistral.create(config, new InitWeights(device, { seed: 3, dtype: 'f32' }), { dtype: 'f32' });
  await saveMistral(whole, folder);
  whole.dispose();
  const load = async (more: LoadOptions = {}): Promise<Mistral> => {
    const file = await openCheckpoint(folder);
    return loadMistral(device, parseMistralConfig(folder.text('config.json')), file, { ...options, ...more });
  };
  if (fourBit) {
    const quantized = await load({ quantization: 'nf4' });
    await saveMistral(quantized, folder);
    quantized.dispose();
  }
  let failures = 0;
  for (; ; failures++) {
    folder.readsLeft = failures;
    const loaded = await load().catch((error: unknown) => error);
    if (loaded instanceof Mistral) {
      loaded.dispose();
      break;
    }
    expect(String(loaded)).toContain('the disk is gone');
    expect(device.stats().liveBytes, `after read ${failures}`).toBe(liveBytes);
  }
  expect(device.stats().liveBytes).toBe(liveBytes);
  // Two of the header, and one at least of each tensor.
  expect(failures).toBeGreaterThan(13);
});
