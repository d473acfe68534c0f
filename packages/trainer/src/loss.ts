/** Completion-only language-model loss of one padded batch: only supervised rows reach the head. */
import { checkpoint } from '@lorikeet/autograd';
import type { CausalLM } from '@lorikeet/nn';
import { add, crossEntropy, gatherRows, reshape, type Tensor } from '@lorikeet/tensor';
import { type Batch, ignoreIndex } from './data.js';

/** Bytes of logits that exist at a time; more rows go through the head in chunks that backward computes again. */
const logitsBytes = 48 << 20;

/** Loss and count of right predictions, both f32 scalars on the device. */
export interface BatchLoss {
  /** Sum over supervised tokens of -log p, divided by `normaliser`. */
  readonly loss: Tensor;
  /** Supervised tokens whose most probable token is the label. */
  readonly correct: Tensor;
}

/**
 * Forward pass and loss of a batch. The label of a token is predicted by the token before it.
 * @param normaliser what the sum is divided by: the supervised tokens of the whole accumulation window
 */
export function batchLoss(
  model: CausalLM,
  batch: Batch,
  normaliser: number,
  options: { readonly checkpointing?: boolean } = {},
): BatchLoss {
  const { B, T } = batch;
  const device = firstDevice(model);
  const rows: number[] = [];
  const targets: number[] = [];
  for (let b = 0; b < B; b++) {
    for (let t = 1; t < T; t++) {
      const label = batch.labels[b * T + t];
      if (label === ignoreIndex) continue;
      rows.push(b * T + t - 1);
      targets.push(label);
    }
  }
  if (rows.length === 0)
    throw new RangeError('batchLoss: no token of the batch is supervised; its loss would be 0 / 0');
  const ids = device.fromArray(batch.ids, [B, T], 'i32');
  const spans = device.fromArray(batch.spans, [B, 2], 'i32');
  const hidden = model.hidden({ ids, spans }, options);
  const h = reshape(hidden, [B * T, hidden.shape[2]]);
  const chunk = Math.max(16, Math.floor(logitsBytes / (4 * model.vocabSize)));
  let total: BatchLoss | undefined;
  for (let from = 0; from < rows.length; from += chunk) {
    const to = Math.min(rows.length, from + chunk);
    const index = device.fromArray(rows.slice(from, to), [to - from], 'i32');
    const labels = device.fromArray(targets.slice(from, to), [to - from], 'i32');
    const run = (x: Tensor, at: Tensor, wanted: Tensor): readonly Tensor[] => {
      const { loss, correct } = crossEntropy(model.logits(gatherRows(x, at)), wanted, { scale: 1 / normaliser });
      return [loss, correct];
    };
    const [loss, correct] = rows.length > chunk ? checkpoint(run, h, index, labels) : run(h, index, labels);
    total =
      total === undefined ? { loss, correct } : { loss: add(total.loss, loss), correct: add(total.correct, correct) };
  }
  if (total === undefined) throw new RangeError('batchLoss: no chunk');
  return total;
}

function firstDevice(model: CausalLM): Tensor['device'] {
  for (const [, p] of model.namedParameters()) return p.device;
  throw new RangeError('batchLoss: the model has no parameters');
}
