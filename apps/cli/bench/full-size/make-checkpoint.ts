/**
 * Writes a checkpoint of Mistral-7B-v0.1's size with random weights of realistic scale, 14.5 GB of bf16 in two shards:
 * `node packages/tensor/bench/run.mjs apps/cli/bench/full-size/make-checkpoint.ts out/mistral-7b [--layers 32] [--tokenizer folder]`
 *
 * The tokenizer is copied from a folder; that of models/base when none is named, whose ids are among Mistral's 32,000.
 */
import { copyFile, mkdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { mistralConfig, mistralTensors, serializeMistralConfig } from '@lorikeet/mistral';
import { hashString, Random } from '@lorikeet/nn';
import { encodeFloats, type TensorEntry, writeCheckpoint } from '@lorikeet/tensor';
import { createFolder } from '@lorikeet/tensor/node';

const { values, positionals } = parseArgs({
  args: process.argv.slice(3),
  allowPositionals: true,
  options: { layers: { type: 'string', default: '32' }, tokenizer: { type: 'string', default: 'models/base' } },
});
const [folder] = positionals;
if (folder === undefined) throw new Error('which folder? It gets 14.5 GB');

const config = mistralConfig({
  vocab_size: 32_000,
  hidden_size: 4096,
  intermediate_size: 14_336,
  num_hidden_layers: Number(values.layers),
  num_attention_heads: 32,
  num_key_value_heads: 8,
  max_position_embeddings: 32_768,
  rms_norm_eps: 1e-5,
  rope_theta: 10_000,
  sliding_window: 4096,
  tie_word_embeddings: false,
  torch_dtype: 'bfloat16',
});

/** bf16 bits of 65,536 normal numbers. */
function normalTable(mean: number, deviation: number): Uint16Array {
  const random = new Random(1, hashString(`${mean} ${deviation}`));
  const { bytes } = encodeFloats(
    Float32Array.from({ length: 65_536 }, () => mean + deviation * random.normal()),
    'BF16',
  );
  return new Uint16Array(bytes.buffer);
}

const weights = normalTable(0, config.initializer_range);
const norms = normalTable(1, 0.05);
const pieceSize = 2 << 20;

/** Numbers drawn from a table two at a time by xorshift, which takes a nanosecond each. */
function* pieces(name: string, size: number, table: Uint16Array): Generator<Uint8Array, void, undefined> {
  let state = hashString(name) | 1;
  for (let at = 0; at < size; at += pieceSize) {
    const piece = new Uint16Array(Math.min(pieceSize, size - at));
    for (let i = 0; i < piece.length; i += 2) {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      piece[i] = table[state & 0xffff];
      piece[i + 1] = table[state >>> 16];
    }
    yield new Uint8Array(piece.buffer);
  }
}

const tensors = mistralTensors(config);
const total = [...tensors.values()].reduce((sum, shape) => sum + 2 * shape.reduce((n, d) => n * d, 1), 0);
const began = performance.now();
let [done, shown] = [0, 0];

async function* bytesOf(name: string, shape: readonly number[]): AsyncGenerator<Uint8Array, void, undefined> {
  const size = shape.reduce((n, d) => n * d, 1);
  for (const piece of pieces(name, size, shape.length === 1 ? norms : weights)) {
    yield piece;
    done += piece.byteLength;
    if (done - shown < 5e8 && done < total) continue;
    shown = done;
    console.log(
      `${(done / 1e9).toFixed(1)} of ${(total / 1e9).toFixed(1)} GB, ${((performance.now() - began) / 1000).toFixed(0)} s`,
    );
  }
}

await mkdir(folder, { recursive: true });
const sink = await createFolder(folder).create('config.json');
await sink.write(new TextEncoder().encode(serializeMistralConfig(config)));
await sink.close();
for (const file of ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json']) {
  const from = join(values.tokenizer, file);
  if ((await stat(from).catch(() => undefined)) !== undefined) await copyFile(from, join(folder, file));
}
const entries = [...tensors].map(
  ([name, shape]): TensorEntry => ({ name, dtype: 'BF16', shape, data: () => bytesOf(name, shape) }),
);
// As the published one is cut.
const files = await writeCheckpoint(createFolder(folder), entries, { maxShardBytes: 9.95e9 });
console.log(`${files.join(', ')} in ${folder}`);
