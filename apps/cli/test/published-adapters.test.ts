/** Published adapters, on models of their shape and of another. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { Mistral, mistralConfig, type MistralOptions } from '@lorikeet/mistral';
import { type Init, initialValues, type Weights } from '@lorikeet/nn';
import { loadAdapter, LoraLinear } from '@lorikeet/peft';
import { add, keep, reshape, scale, scope, type Tensor } from '@lorikeet/tensor';
import { openFolder, openSafetensorsFile } from '@lorikeet/tensor/node';
import { relativeError, sharedDir, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';

const device = await testDevice();

/** One tensor per shape, shared by all layers: a model as deep and wide as the real one in little memory. */
class SharedWeights implements Weights {
  readonly #made = new Map<string, Tensor>();

  get(path: string, shape: readonly number[], init: Init): Promise<Tensor> {
    const key = `${init.kind} ${shape.join()}`;
    let tensor = this.#made.get(key);
    if (tensor === undefined) {
      const size = shape.reduce((n, d) => n * d, 1);
      const values = new Float32Array(size);
      for (let i = 0; i < size; i++) values[i] = init.kind === 'ones' ? 1 : Math.sin(i * i + path.length) / 32;
      tensor = keep(device.fromArray(values, shape, 'f16'));
      this.#made.set(key, tensor);
    }
    return Promise.resolve(tensor.retain());
  }

  dispose(): void {
    for (const tensor of this.#made.values()) tensor.dispose();
  }
}

const adapters = join(sharedDir() ?? '', 'data', 'adapters');
describe.skipIf(sharedDir() === undefined || !existsSync(adapters))(
  'published adapters (needs the shared data folder)',
  () => {
    // The shape of TinyLlama 1.1B with made-up weights: every layer has the same, so that they take 250 MB.
    const tinyLlama: MistralOptions = {
      vocab_size: 32000,
      hidden_size: 2048,
      intermediate_size: 5632,
      num_hidden_layers: 22,
      num_attention_heads: 32,
      num_key_value_heads: 4,
      head_dim: 64,
    };
    const create = async (options: MistralOptions): Promise<Mistral> => {
      const weights = new SharedWeights();
      const model = await Mistral.create(mistralConfig(options), weights, { dtype: 'f16' });
      weights.dispose();
      return model;
    };

    /** Logits of a row of three tokens. */
    async function logits(model: Mistral): Promise<ArrayLike<number>> {
      const y = scope(() => {
        const ids = device.fromArray([1, 5, 9], [1, 3], 'i32');
        const h = model.hidden({ ids, spans: device.fromArray([0, 3], [1, 2], 'i32') });
        return keep(model.logits(reshape(h, [3, model.config.hidden_size])));
      });
      const read = y.read();
      y.dispose();
      return read;
    }

    it('TinyLlama r 4 q+v loads on a model of its shape, adds what its file says, and goes', async () => {
      const folder = join(adapters, 'tinyllama-r4-qv');
      const model = await create(tinyLlama);
      expect(model.parameterCount).toBe(1_100_048_384);
      const parameters = [...model.namedParameters()];
      const before = await logits(model);
      const adapter = await loadAdapter(model, openFolder(folder));
      expect(adapter.layers.size).toBe(44);
      expect(adapter.trainableReport().trainable).toBe(22 * 4 * (2048 + 2048 + 2048 + 256));
      expect(Math.min(...(await adapter.updateNorms()).values())).toBeGreaterThan(0);

      const file = await openSafetensorsFile(join(folder, 'adapter_model.safetensors'));
      const x = initialValues('x', 2 * 2048, { kind: 'normal', std: 1 }, 1);
      for (const path of ['model.layers.0.self_attn.q_proj', 'model.layers.21.self_attn.v_proj']) {
        const [a, b] = [
          await file.readFloats(`base_model.model.${path}.lora_A.weight`),
          await file.readFloats(`base_model.model.${path}.lora_B.weight`),
        ];
        const truth: number[] = [];
        for (const row of [x.subarray(0, 2048), x.subarray(2048)]) {
          const inner = [0, 1, 2, 3].map((k) => row.reduce((total, v, i) => total + v * a[k * 2048 + i], 0));
          // lora_alpha / r = 2
          for (let o = 0; o < b.length / 4; o++)
            truth.push(2 * inner.reduce((total, v, k) => total + v * b[o * 4 + k], 0));
        }
        const layer = adapter.layers.get(path);
        if (!(layer instanceof LoraLinear)) throw new Error(`${path} is not adapted`);
        const added = scope(() => {
          const input = device.fromArray(x, [2, 2048]);
          return keep(add(layer.forward(input), scale(layer.base_layer.forward(input), -1)));
        });
        expect(relativeError(await added.read(), truth), path).toBeLessThan(1e-3);
        added.dispose();
      }
      await file.close();

      const apart = await logits(model);
      expect(apart).not.toEqual(before);
      expect(Array.from(apart).every(Number.isFinite)).toBe(true);
      adapter.remove();
      expect([...model.namedParameters()]).toEqual(parameters);
      model.dispose();
    });

    it('on a model of another shape every tensor that does not fit is named', async () => {
      const small = { ...tinyLlama, vocab_size: 64, intermediate_size: 64 };
      const model = await create({ ...small, num_hidden_layers: 2, num_key_value_heads: 8 });
      const problem = await loadAdapter(model, openFolder(join(adapters, 'tinyllama-r4-qv'))).catch(String);
      // Two v_proj.lora_B of another shape, and twenty layers that are not there.
      expect(problem).toContain('82 tensors do not fit');
      expect(problem).toContain(
        'model.layers.1.self_attn.v_proj.lora_B.weight is [256, 4], the model asks for [512, 4]',
      );
      for (let i = 2; i < 22; i++) {
        for (const part of ['q_proj.lora_A', 'q_proj.lora_B', 'v_proj.lora_A', 'v_proj.lora_B']) {
          expect(problem).toContain(`unexpected "base_model.model.model.layers.${i}.self_attn.${part}.weight"`);
        }
      }
      const before = [...model.namedParameters()].length;
      const opt = await loadAdapter(model, openFolder(join(adapters, 'opt125m-r16-qv-bf16'))).catch(String);
      expect(opt).toContain('none of its tensors belongs to this model');
      expect(opt).toContain('missing base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [16, 2048]');
      expect(opt).toContain(
        'unexpected "base_model.model.model.decoder.layers.11.self_attn.v_proj.lora_B.weight" [768, 16]',
      );
      await expect(loadAdapter(model, openFolder(join(adapters, 'neox-r1-f16')))).rejects.toThrow(
        'target_modules ["query_key_value"] matches no module',
      );
      expect([...model.namedParameters()]).toHaveLength(before);
      model.dispose();
    });

    it('phi-1.5, whose names and widths are those of TinyLlama, is refused for its value heads and its depth', async () => {
      const model = await create({ ...tinyLlama, vocab_size: 64, intermediate_size: 64 });
      const problem = await loadAdapter(model, openFolder(join(adapters, 'phi15-r4-qv-peft018'))).catch(String);
      // 22 v_proj.lora_B of another shape, and four tensors in each of two layers that are not there.
      expect(problem).toContain('30 tensors do not fit');
      for (let i = 0; i < 22; i++) {
        expect(problem).toContain(
          `model.layers.${i}.self_attn.v_proj.lora_B.weight is [2048, 4], the model asks for [256, 4]`,
        );
      }
      expect(problem).toContain('unexpected "base_model.model.model.layers.23.self_attn.v_proj.lora_B.weight"');
      model.dispose();
    });
  },
);
