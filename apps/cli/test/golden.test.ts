/** The whole path against PyTorch in float64: logits, hidden states, LoRA gradients, merges, and training runs. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { loadMistral, type Mistral, parseMistralConfig } from '@lorikeet/mistral';
import { type Adapter, injectAdapter, loadAdapter, loraConfig } from '@lorikeet/peft';
import { type Device, keep, memorySource, openSafetensors, reshape, scope } from '@lorikeet/tensor';
import { openCheckpointFolder, openFolder } from '@lorikeet/tensor/node';
import { type Array64, MemoryFolder, readGolden, relativeError, sharedDir, testDevice } from '@lorikeet/testing';
import { type AdamWOptions, type Batch, batchLoss, scheduleTable, Stepper } from '@lorikeet/trainer';
import { beforeAll, describe, expect, it } from 'vitest';

const shared = sharedDir();
const where = shared === undefined ? ' (no shared data here)' : '';
const folder = (...parts: string[]): string => join(shared ?? '', ...parts);
const cases = ['gqa', 'window', 'tied'] as const;
const dtypes = ['f32', 'f16'] as const;

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

async function model(path: string, dtype: 'f32' | 'f16'): Promise<Mistral> {
  const config = parseMistralConfig(readFileSync(join(path, 'config.json'), 'utf8'));
  const file = await openCheckpointFolder(path);
  try {
    return await loadMistral(device, config, file, { dtype });
  } finally {
    await file.close();
  }
}

/** A batch from stored ids, mask and labels. */
function batchOf(ids: Array64, mask: Array64, labels: Array64): Batch {
  const [B, T] = ids.shape;
  const spans = new Int32Array(2 * B);
  const shifted = Int32Array.from(labels.data);
  for (let b = 0; b < B; b++) {
    const row = Array.from(mask.data.slice(b * T, (b + 1) * T));
    spans.set([row.indexOf(1), row.lastIndexOf(1) + 1], 2 * b);
    shifted[b * T] = -100;
  }
  const supervised = shifted.reduce((n, label) => n + (label === -100 ? 0 : 1), 0);
  return {
    ids: Int32Array.from(ids.data),
    labels: shifted,
    spans,
    B,
    T,
    supervised,
    rows: Array.from({ length: B }, (_, b) => b),
  };
}

/** The values at real tokens; those at padding mean nothing. */
function real(values: ArrayLike<number>, { spans, B, T }: Batch): Float64Array {
  const width = values.length / (B * T);
  const out: number[] = [];
  for (let b = 0; b < B; b++)
    for (let i = (b * T + spans[2 * b]) * width; i < (b * T + spans[2 * b + 1]) * width; i++) out.push(values[i]);
  return Float64Array.from(out);
}

async function logits(m: Mistral, { ids, spans, B, T }: Batch): Promise<ArrayLike<number>> {
  const y = scope(() => {
    const h = m.hidden({ ids: device.fromArray(ids, [B, T], 'i32'), spans: device.fromArray(spans, [B, 2], 'i32') });
    return keep(m.logits(reshape(h, [B * T, m.config.hidden_size])));
  });
  const values = await y.read();
  y.dispose();
  return values;
}

async function gradients(
  m: Mistral,
  adapter: Adapter,
  batch: Batch,
  checkpointing: boolean,
  scale: number,
): Promise<Map<string, Float64Array>> {
  const stepper = new Stepper(m, adapter.parameters(), {
    learningRates: [0],
    gradient_checkpointing: checkpointing,
    lossScale: scale === 1 ? undefined : { init: scale },
  });
  const { grads, sums } = stepper.gradients([batch]);
  const out = new Map<string, Float64Array>();
  for (const [i, [name]] of stepper.optimizer.parameters.entries()) {
    out.set(
      name,
      Float64Array.from(await grads[i].read(), (g) => g / scale),
    );
  }
  sums.loss.dispose();
  sums.correct.dispose();
  stepper.dispose();
  return out;
}

describe.skipIf(shared === undefined).each(cases)(`golden %s${where}`, (name) => {
  describe.each(dtypes)('%s', (dtype) => {
    const f32 = dtype === 'f32';

    it('logits, hidden states, loss and LoRA gradients; the same bits with checkpointing', async () => {
      const io = await readGolden(folder('golden', name, 'io.safetensors'));
      const batch = batchOf(io['ids'], io['mask'], io['labels']);
      const m = await model(folder('golden', name, 'model'), dtype);
      const base = relativeError(real(await logits(m, batch), batch), real(io['logits'].data, batch));
      expect(base).toBeLessThanOrEqual(f32 ? 1e-5 : 1e-2);
      const adapter = await loadAdapter(m, openFolder(folder('golden', name, 'adapter')));
      const adapted = relativeError(real(await logits(m, batch), batch), real(io['logits_lora'].data, batch));
      expect(adapted).toBeLessThanOrEqual(f32 ? 1e-5 : 1e-2);

      const hidden = scope(() => {
        const spans = device.fromArray(batch.spans, [batch.B, 2], 'i32');
        let x = m.model.embed_tokens.forward(device.fromArray(batch.ids, [batch.B, batch.T], 'i32'), dtype);
        return keep(
          m.model.layers.map((layer) => {
            x = layer.forward(x, { spans });
            return x;
          }),
        );
      });
      for (const [i, x] of hidden.entries()) {
        const error = relativeError(real(await x.read(), batch), real(io[`hidden_lora.${i}`].data, batch));
        expect(error, `hidden_lora.${i}`).toBeLessThanOrEqual(f32 ? 1e-5 : 1e-2);
        x.dispose();
      }

      const sums = scope(() => keep(batchLoss(m, batch, batch.supervised)));
      const loss = await sums.loss.item();
      const wanted = io['loss_lora'].data[0];
      expect(Math.abs(loss - wanted) / wanted).toBeLessThanOrEqual(f32 ? 1e-5 : 1e-3);
      sums.loss.dispose();
      sums.correct.dispose();

      const scale = f32 ? 1 : 65536;
      const grads = await gradients(m, adapter, batch, false, scale);
      expect(grads.size).toBeGreaterThan(0);
      for (const [key, grad] of grads) {
        expect(relativeError(grad, io[`grad.${key}`].data), key).toBeLessThanOrEqual(f32 ? 1e-4 : 2e-2);
      }
      const again = await gradients(m, adapter, batch, true, scale);
      for (const [key, grad] of grads) expect(again.get(key), key).toEqual(grad);
      adapter.remove();
      m.dispose();
    });

    it('every step of the training run, and the trained adapter', async () => {
      const run: unknown = JSON.parse(readFileSync(folder('golden', name, 'train.json'), 'utf8'));
      const settings = run as AdamWOptions & {
        learning_rate: number;
        warmup_ratio: number;
        gradient_accumulation_steps: number;
        batches: number;
        log: {
          loss: number;
          grad_norm: number;
          learning_rate: number;
          supervised_tokens: number;
          mean_token_accuracy: number;
        }[];
      };
      const data = await readGolden(folder('golden', name, 'train.safetensors'));
      const m = await model(folder('golden', name, 'model'), dtype);
      const adapter = await loadAdapter(m, openFolder(folder('golden', name, 'adapter0')));
      const learningRates = scheduleTable({
        type: 'cosine',
        learningRate: settings.learning_rate,
        totalSteps: settings.log.length,
        warmupRatio: settings.warmup_ratio,
      });
      const stepper = new Stepper(m, adapter.parameters(), {
        ...settings,
        learningRates,
        lossScale: f32 ? undefined : {},
      });
      for (const [s, wanted] of settings.log.entries()) {
        const window = Array.from({ length: settings.gradient_accumulation_steps }, (_, i) => {
          const at = s * settings.gradient_accumulation_steps + i;
          return batchOf(data[`${at}.ids`], data[`${at}.mask`], data[`${at}.labels`]);
        });
        const record = await stepper.step(window);
        expect(record.skipped).toBe(false);
        expect(record.supervisedTokens).toBe(wanted.supervised_tokens);
        expect(Math.abs(record.loss - wanted.loss) / wanted.loss, `loss ${s}`).toBeLessThanOrEqual(f32 ? 1e-5 : 1e-3);
        expect(Math.abs(learningRates[record.goodSteps] - wanted.learning_rate)).toBeLessThanOrEqual(1e-12);
        if (f32) {
          expect(Math.abs(record.gradNorm - wanted.grad_norm) / wanted.grad_norm, `norm ${s}`).toBeLessThanOrEqual(
            1e-4,
          );
          expect(record.tokenAccuracy).toBeCloseTo(wanted.mean_token_accuracy, 6);
        }
      }
      if (f32) {
        const before = await readGolden(folder('golden', name, 'adapter0', 'adapter_model.safetensors'));
        const after = await readGolden(folder('golden', name, 'trained.safetensors'));
        let moved = 0;
        let off = 0;
        for (const [key, parameter] of adapter.parameters()) {
          const values = await parameter.read();
          const reference = after[key] ?? after[key.replace('base_model.model.', '')];
          reference.data.forEach((r, i) => {
            moved += (r - before[key].data[i]) ** 2;
            off += (values[i] - r) ** 2;
          });
        }
        expect(Math.sqrt(off / moved)).toBeLessThanOrEqual(1e-3);
      }
      stepper.dispose();
      adapter.remove();
      m.dispose();
    });
  });

  it('merge and exact unmerge; the adapter written and read again', async () => {
    const merged = await readGolden(folder('golden', name, 'merged.safetensors'));
    const m = await model(folder('golden', name, 'model'), 'f32');
    const adapter = await loadAdapter(m, openFolder(folder('golden', name, 'adapter')));
    const path = [...adapter.layers.keys()];
    const weights = async (): Promise<(readonly number[])[]> =>
      Promise.all(
        [...m.namedParameters()]
          .filter(([key]) => key.endsWith('base_layer.weight'))
          .map(async ([, w]) => Array.from(await w.read())),
      );
    const before = await weights();
    adapter.merge();
    const after = await weights();
    for (const [i, values] of after.entries()) {
      expect(relativeError(values, merged[`${path[i]}.weight`].data), path[i]).toBeLessThanOrEqual(1e-6);
    }
    adapter.unmerge();
    expect(await weights()).toEqual(before);

    const saved = new MemoryFolder();
    await adapter.save(saved);
    const source = memorySource(saved.bytes('adapter_model.safetensors'));
    const written = await openSafetensors(source);
    const original = await readGolden(folder('golden', name, 'adapter', 'adapter_model.safetensors'));
    expect([...written.tensors.keys()].sort()).toEqual(Object.keys(original).sort());
    for (const key of written.tensors.keys()) {
      expect(Array.from(await written.readFloats(key))).toEqual(Array.from(original[key].data));
    }
    adapter.remove();
    m.dispose();
  });
});

const stories = folder('data', 'stories260k');
describe.skipIf(!existsSync(stories))(`stories260k, a pretrained model${where}`, () => {
  it('LoRA gradients and five AdamW losses as PyTorch in float64', async () => {
    const raw: unknown = JSON.parse(readFileSync(join(stories, 'golden_lora_torch.json'), 'utf8'));
    const golden = raw as {
      ids: number[];
      labels: number[];
      loss0: number;
      grads0: Record<
        string,
        { A_grad_norm: number; B_grad_norm: number; A_grad_first4: number[]; B_grad_first4: number[] }
      >;
      adamw: { losses_before_each_step_then_final: number[] };
    };
    const m = await model(stories, 'f32');
    const adapter = injectAdapter(m, loraConfig({ r: 4, lora_alpha: 8, target_modules: ['q_proj', 'v_proj'] }));
    for (const [i, path] of [...adapter.layers.keys()].entries()) {
      for (const [part, p] of adapter.layers.get(path)?.adapterParameters() ?? []) {
        const width = p.shape[1];
        const start = Array.from({ length: p.size }, (_, at) =>
          part === 'lora_A.weight'
            ? Math.sin(0.37 * at + 0.11 * i) / Math.sqrt(width)
            : 0.02 * Math.cos(0.53 * at + 0.07 * i),
        );
        scope(() => device.copy(device.fromArray(start, p.shape), p));
      }
    }
    const T = golden.ids.length;
    const supervised = golden.labels.filter((label) => label !== -100).length;
    const batch: Batch = {
      ids: Int32Array.from(golden.ids),
      labels: Int32Array.from(golden.labels),
      spans: Int32Array.of(0, T),
      B: 1,
      T,
      supervised,
      rows: [0],
    };
    const grads = await gradients(m, adapter, batch, false, 1);
    for (const [path, wanted] of Object.entries(golden.grads0)) {
      for (const part of ['A', 'B'] as const) {
        const grad = grads.get(`base_model.model.${path}.lora_${part}.weight`) ?? new Float64Array();
        const norm = Math.hypot(...grad);
        expect(Math.abs(norm - wanted[`${part}_grad_norm`]) / wanted[`${part}_grad_norm`], path).toBeLessThanOrEqual(
          1e-5,
        );
        grad.slice(0, 4).forEach((g, j) => {
          expect(Math.abs(g - wanted[`${part}_grad_first4`][j]), path).toBeLessThanOrEqual(1e-5 * norm);
        });
      }
    }
    const losses = golden.adamw.losses_before_each_step_then_final;
    const stepper = new Stepper(m, adapter.parameters(), {
      learningRates: losses.map(() => 1e-3),
      weight_decay: 0.01,
      max_grad_norm: 0,
    });
    for (const wanted of losses) {
      const { loss } = await stepper.step([batch]);
      expect(Math.abs(loss - wanted) / wanted).toBeLessThanOrEqual(1e-5);
    }
    stepper.dispose();
    adapter.remove();
    m.dispose();
  });
});
