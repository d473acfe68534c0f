/** The net of fixtures/make.py that has attention: the places of virtual tokens are those of Mistral. */
import { Embedding, type Layer, Linear, Module, type RMSNorm, VirtualTokens } from '@lorikeet/nn';
import {
  add,
  attention,
  type Device,
  gatherRows,
  insertRows,
  removeRows,
  reshape,
  ropeQk,
  type Tensor,
  widenSpans,
} from '@lorikeet/tensor';
import { FixtureFile, FixtureLayers, FixtureNet, type Storage } from './method-net.js';

/** The fixtures of virtual tokens. */
export const virtualTokensFile = new FixtureFile('virtual-tokens.json');

/** The rows of make.py as a batch: the first is padded on the right, the second on the left. */
const length = 6;
const ids = [3, 7, 1, 5, 2, 10, 10, 10, 8, 0, 4, 4];
const spans = [0, 5, 2, 6];
/** Where the batch has real tokens. */
const real = [0, 1, 2, 3, 4, 8, 9, 10, 11];
const headColumns = 8;

class Block extends Module {
  norm: RMSNorm;
  q_proj: Layer;
  k_proj: Layer;
  v_proj: Layer;
  o_proj: Layer;

  constructor(norm: RMSNorm, q: Layer, k: Layer, v: Layer, o: Layer) {
    super();
    this.norm = norm;
    this.q_proj = q;
    this.k_proj = k;
    this.v_proj = v;
    this.o_proj = o;
  }

  forward(x: Tensor, at: Tensor, layer: number, prefix: Tensor | undefined): Tensor {
    const [B, T] = x.shape;
    const past = prefix?.shape[0] ?? 0;
    const h = this.norm.forward(x);
    const heads = (y: Tensor): Tensor => reshape(y, [B, y.shape[1], y.columns / headColumns, headColumns]);
    const before = (y: Tensor, column: number): Tensor =>
      prefix === undefined ? y : insertRows(reshape(y, [B, T, headColumns]), at, prefix, { column });
    const [q, k] = ropeQk(heads(this.q_proj.forward(h)), heads(this.k_proj.forward(h)), at, { positionOffset: past });
    const keys = heads(before(k, 2 * layer * headColumns));
    const values = heads(before(this.v_proj.forward(h), (2 * layer + 1) * headColumns));
    const y = attention(q, keys, values, widenSpans(at, past), { queryOffset: past });
    return add(x, this.o_proj.forward(reshape(y, [B, T, 2 * headColumns])));
  }
}

export class AttentionNet extends FixtureNet {
  embed_tokens: Embedding;
  virtual_tokens = new VirtualTokens({ hidden: 16, layers: 2, heads: 2, keyValueHeads: 1, headColumns });
  layers: Block[];
  norm: RMSNorm;
  lm_head: Layer;
  readonly #dtype: 'f32' | 'f16';

  constructor(device: Device, storage: Storage = 'f32') {
    super();
    const make = new FixtureLayers(device, virtualTokensFile, storage);
    this.#dtype = make.dtype;
    this.embed_tokens = new Embedding(make.weight('embed_tokens'));
    this.layers = [0, 1].map((i) => {
      const linear = (name: string): Linear => make.linear(`layers.${i}.${name}`);
      const [q, k, v, o] = ['q_proj', 'k_proj', 'v_proj', 'o_proj'].map(linear);
      return new Block(make.norm(`layers.${i}.norm`), q, k, v, o);
    });
    this.norm = make.norm('norm');
    this.lm_head = new Linear(make.weight('lm_head'));
  }

  get labels(): readonly number[] {
    return virtualTokensFile.labels;
  }

  override logits(): Tensor {
    const { device } = this.embed_tokens.weight;
    const at = device.fromArray(spans, [2, 2], 'i32');
    const prompt = this.virtual_tokens.embeddings();
    const prefix = this.virtual_tokens.keysAndValues();
    let x = this.embed_tokens.forward(device.fromArray(ids, [2, length], 'i32'), this.#dtype);
    if (prompt !== undefined) x = insertRows(x, at, prompt);
    const widened = prompt === undefined ? at : widenSpans(at, prompt.shape[0]);
    for (const [i, block] of this.layers.entries()) x = block.forward(x, widened, i, prefix);
    if (prompt !== undefined) x = removeRows(x, at, prompt.shape[0]);
    const h = this.norm.forward(x);
    const rows = gatherRows(reshape(h, [2 * length, h.columns]), device.fromArray(real, [real.length], 'i32'));
    return this.lm_head.forward(rows);
  }
}
