/** Several adapters on one Mistral: a server's loop, answers of rows with adapters of their own, and sums. */
import {
  type Generated,
  generate,
  type GenerationConfig,
  Mistral,
  mistralConfig,
  resolveGenerationConfig,
} from '@lorikeet/mistral';
import { hashString, initialValues, InitWeights, Linear } from '@lorikeet/nn';
import {
  type Adapter,
  type AdapterConfig,
  AdapterSet,
  hostMatrix,
  injectAdapter,
  loraConfig,
  prefixTuningConfig,
  product,
  promptTuningConfig,
} from '@lorikeet/peft';
import { type Device, keep, reshape, scope, type Tensor } from '@lorikeet/tensor';
import { relativeError, testDevice } from '@lorikeet/testing';
import { beforeAll, describe, expect, it } from 'vitest';

let device: Device;
beforeAll(async () => {
  device = await testDevice();
});

const vocab = 61;
const config = mistralConfig({
  vocab_size: vocab,
  hidden_size: 32,
  intermediate_size: 40,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  sliding_window: 9,
  initializer_range: 0.3,
});
const configs = {
  one: loraConfig({ r: 4, lora_alpha: 8, target_modules: 'all-linear' }),
  two: loraConfig({ r: 3, lora_alpha: 8, use_rslora: true, target_modules: ['q_proj', 'down_proj', 'lm_head'] }),
  three: loraConfig({ r: 6, lora_alpha: 6, target_modules: 'all-linear' }),
} as const;
type Name = keyof typeof configs;
const names = ['one', 'two'] as const;

const mistral = (dtype: 'f32' | 'f16' = 'f32'): Promise<Mistral> =>
  Mistral.create(config, new InitWeights(device, { seed: 3, dtype }), { dtype });

function assign(p: Tensor, data: ArrayLike<number>): void {
  scope(() => device.copy(device.fromArray(data, p.shape), p));
}

/** Gives an adapter values that change the answers. */
function move(adapter: Adapter, salt: string): void {
  for (const [name, p] of adapter.parameters()) {
    assign(p, initialValues(name, p.size, { kind: 'normal', std: 0.3 }, hashString(salt)));
  }
}

async function setOver(
  model: Mistral,
  adapters: Readonly<Record<string, AdapterConfig>> = configs,
): Promise<AdapterSet> {
  const set = new AdapterSet(model);
  for (const [name, config] of Object.entries(adapters)) move(await set.add(name, config), name);
  return set;
}

const prompts = [[1, 5, 9], [7], [2, 40, 41, 42, 17], [60, 3], [11, 12, 13, 14]];

function answer(
  model: Mistral,
  of: readonly (readonly number[])[],
  options: GenerationConfig = {},
): Promise<Generated[]> {
  const settings = resolveGenerationConfig(undefined, { max_new_tokens: 8, ...options }).config;
  return generate(model, of, { config: settings });
}

/** What each prompt gets by itself, under an adapter that is alone on its model, or by the base. */
async function truth(name: Name | null, dtype: 'f32' | 'f16' = 'f32'): Promise<number[][]> {
  const model = await mistral(dtype);
  if (name !== null) move(injectAdapter(model, configs[name]), name);
  const answers: number[][] = [];
  for (const prompt of prompts) answers.push((await answer(model, [prompt]))[0].ids);
  model.dispose();
  return answers;
}

/** What grows when something leaks. */
function counted(): Record<string, number> {
  const { liveBytes, pooledBytes, buffersCreated, bindGroupsCreated, pipelinesCreated } = device.stats();
  return { liveBytes, pooledBytes, buffersCreated, bindGroupsCreated, pipelinesCreated };
}

describe('a server of two adapters', () => {
  it('swaps a hundred times, answers as each adapter alone, and grows by nothing after two rounds', async () => {
    const single = { one: await truth('one'), two: await truth('two') };
    expect(single.one).not.toEqual(single.two);
    const model = await mistral();
    const set = await setOver(model);
    let steady: Record<string, number> | undefined;
    for (let swap = 0; swap < 100; swap++) {
      const name = names[swap % 2];
      const i = Math.floor(swap / 2) % prompts.length;
      set.activate(name);
      const [{ ids }] = await answer(model, [prompts[i]], { max_new_tokens: 4 });
      expect(ids, `swap ${swap}`).toEqual(single[name][i].slice(0, 4));
      // Two rounds of all prompts under both.
      if (swap === 4 * prompts.length - 1) steady = counted();
    }
    expect(counted()).toEqual(steady);
    set.dispose();
    model.dispose();
  });

  // In f16 all have the same targets: what an adapter has no update for is rounded elsewhere in a run of its own, where it goes
  // through kernels that fuse more, and two tokens of a random model may be that close.
  it.each([
    { dtype: 'f32', rows: ['one', null, 'two', 'one', 'two'] },
    { dtype: 'f16', rows: ['one', 'three', 'three', 'one', 'three'] },
  ] as const)('$dtype: rows of one batch have adapters of their own, also when others have ended', async (c) => {
    const { dtype, rows } = c;
    const single = new Map<Name | null, number[][]>();
    for (const name of new Set(rows)) single.set(name, await truth(name, dtype));
    const whole = rows.map((name, i) => single.get(name)?.[i] ?? []);
    // Tokens on which most rows end early, so that the others go on in a smaller batch.
    const eos_token_id = [whole[0][1], whole[1][2], whole[3][2]];
    const expected = whole.map((ids) => {
      const end = ids.findIndex((id) => eos_token_id.includes(id));
      return end < 0 ? ids : ids.slice(0, end + 1);
    });
    const running = expected.filter((ids) => ids.length > 5).length;
    expect(running).toBeGreaterThan(0);
    expect(2 * running).toBeLessThan(rows.length);
    const model = await mistral(dtype);
    const set = await setOver(model);
    const run = (): Promise<Generated[]> => set.rows(rows, () => answer(model, prompts, { eos_token_id }));
    let steady: Record<string, number> | undefined;
    for (let round = 0; round < 6; round++) {
      expect((await run()).map(({ ids }) => ids)).toEqual(expected);
      if (round === 2) steady = counted();
    }
    expect(counted()).toEqual(steady);
    // More rows than the fused kernels of one token take.
    const limits = { max_new_tokens: 2 };
    const twice = await set.rows([...rows, ...rows], () => answer(model, [...prompts, ...prompts], limits));
    expect(twice.map(({ ids }) => ids)).toEqual([...whole, ...whole].map((ids) => ids.slice(0, 2)));
    await expect(set.rows(['one', 'two'], () => answer(model, prompts))).rejects.toThrow(
      'rows: 2 rows have an adapter, but row 2 of a batch runs',
    );
    set.dispose();
    model.dispose();
  });
});

/** Logits [T, V] of a prompt. */
async function logits(model: Mistral): Promise<number[]> {
  const [, , prompt] = prompts;
  const y = scope(() => {
    const spans = device.fromArray([0, prompt.length], [1, 2], 'i32');
    const h = model.hidden({ ids: device.fromArray(prompt, [1, prompt.length], 'i32'), spans });
    return keep(model.logits(reshape(h, [prompt.length, h.columns])));
  });
  const read = y.read();
  y.dispose();
  return Array.from(await read);
}

it('a sum of adapters on a Mistral is that of the updates in float64; disabled() is the base to the bit', async () => {
  const model = await mistral();
  const base = await logits(model);
  const set = await setOver(model);
  const weights = [0.5, 1.5];
  set.activate(names, { weights });
  const sum = await logits(model);
  expect(await set.disabled(() => logits(model))).toEqual(base);
  expect(await logits(model)).toEqual(sum);

  const other = await mistral();
  for (const [path, module] of other.namedModules()) {
    if (!(module instanceof Linear)) continue;
    const wide = Float64Array.from(await module.weight.read());
    for (const [i, name] of names.entries()) {
      const parameters = new Map(set.get(name).parameters());
      const [a, b] = ['A', 'B'].map((part) => parameters.get(`base_model.model.${path}.lora_${part}.weight`));
      if (a === undefined || b === undefined) continue;

      const update = product(await hostMatrixOf(b), await hostMatrixOf(a));
      const scaling = { one: 2, two: 8 / Math.sqrt(3) }[name];
      update.data.forEach((v, at) => {
        wide[at] += weights[i] * scaling * v;
      });
    }
    assign(module.weight, wide);
  }
  const expected = await logits(other);
  expect(relativeError(sum, expected)).toBeLessThan(1e-5);
  expect(relativeError(expected, base)).toBeGreaterThan(0.1);
  set.dispose();
  model.dispose();
  other.dispose();
});

async function hostMatrixOf(x: Tensor): Promise<ReturnType<typeof hostMatrix>> {
  return hostMatrix(x.shape[0], x.shape[1], await x.read());
}

it('virtual tokens and LoRA take turns on one Mistral, and work together', async () => {
  const model = await mistral();
  const base = await logits(model);
  const methods: Readonly<Record<string, AdapterConfig>> = {
    lora: configs.one,
    prompt: promptTuningConfig({ num_virtual_tokens: 3 }),
    prefix: prefixTuningConfig({ num_virtual_tokens: 3 }),
  };
  const set = await setOver(model, methods);
  for (const name of ['prefix', 'lora', 'prompt', 'lora']) {
    set.activate(name);
    const other = await mistral();
    move(injectAdapter(other, methods[name]), name);
    expect(await logits(model), name).toEqual(await logits(other));
    expect(await set.disabled(() => logits(model)), name).toEqual(base);
    other.dispose();
  }
  set.activate(['lora', 'prefix']);
  const other = await mistral();
  const first = injectAdapter(other, methods['lora']);
  move(first, 'lora');
  first.mergeAndUnload();
  move(injectAdapter(other, methods['prefix']), 'prefix');
  expect(relativeError(await logits(model), await logits(other))).toBeLessThan(1e-5);
  expect(() => set.activate(['prompt', 'prefix'])).toThrow('there is no sum at');
  set.dispose();
  model.dispose();
  other.dispose();
});
