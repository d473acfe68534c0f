/** What every method must show, on the net of the fixtures. */
import { type Device, memorySource, openSafetensors } from '@lorikeet/tensor';
import { MemoryFolder, relativeError } from '@lorikeet/testing';
import { expect, it } from 'vitest';
import type { Adapter } from '../src/adapter.js';
import { injectAdapter } from '../src/create-adapter.js';
import { loadAdapter } from '../src/load-adapter.js';
import type { AdapterConfig } from '../src/format.js';
import {
  type FixtureFile,
  type FixtureNet,
  gradientsOf,
  methodFile,
  MethodNet,
  type Storage,
  type Stored,
  tenSteps,
} from './method-net.js';
import { assign, values } from './tiny-model.js';

/** A method under check. */
export interface MethodCheck {
  /** Its name in the file of fixtures. */
  readonly fixture: string;
  /** The file, and its net; `MethodNet` and its file when left out. */
  readonly over?: { readonly file: FixtureFile; readonly Net: new (device: Device, storage?: Storage) => FixtureNet };
  readonly config: AdapterConfig;
  /** The fixture's name of a parameter by its name in the file. */
  readonly fixtureName?: (key: string) => string;
  /** False for methods that are no change of a weight. Default true. */
  readonly mergeable?: boolean;
  /** False for methods that cannot start as a no-op. Default true. */
  readonly startsAsNoOp?: boolean;
  /** False for methods whose files hold something else than the parameters. Default true. */
  readonly savesParameters?: boolean;
}

const plainName = (key: string): string => key.replace('base_model.model.', '');

function startOf(start: ReadonlyMap<string, Stored>, name: string): Stored {
  const found = start.get(name);
  if (found === undefined) throw new Error(`the fixture has no ${name}; it has ${[...start.keys()].join(', ')}`);
  return found;
}

/** Moves every parameter, by little, so that nothing vanishes. */
export async function move(adapter: Adapter): Promise<void> {
  for (const [name, p] of adapter.parameters()) {
    const now = await p.read();
    assign(
      p,
      values(name, p.size).map((v, i) => now[i] + 0.3 * v),
    );
  }
}

/** Declares the tests of a method. */
export function checkMethod(device: Device, check: MethodCheck): void {
  const { config, fixture, fixtureName = plainName } = check;
  const { mergeable = true, startsAsNoOp = true, savesParameters = true } = check;
  const { file: fixtures, Net } = check.over ?? { file: methodFile, Net: MethodNet };
  const start = startsAsNoOp ? 'starts as a no-op' : 'starts';

  it.each(['f32', 'f16', 'nf4'] as const)(`${start} over %s and goes without a trace`, async (storage) => {
    const live = device.stats().liveBytes;
    const net = new Net(device, storage);
    const own = device.stats().liveBytes;
    const before = await net.readLogits();
    if (storage === 'f32') expect(relativeError(before, fixtures.baseLogits)).toBeLessThan(1e-5);
    const adapter = injectAdapter(net, config);
    const first = await net.readLogits();
    if (startsAsNoOp) expect(first).toEqual(before);
    else expect(first.every(Number.isFinite)).toBe(true);
    expect(new Set((await adapter.updateNorms()).values())).toEqual(new Set(mergeable ? [0] : []));
    await move(adapter);
    expect(await net.readLogits()).not.toEqual(before);
    adapter.remove();
    expect(device.stats().liveBytes).toBe(own);
    expect(await net.readLogits()).toEqual(before);
    injectAdapter(net, config);
    net.dispose();
    expect(device.stats().liveBytes).toBe(live);
  });

  it('ten steps give the losses, gradients and logits of PyTorch in float64', async () => {
    const truth = fixtures.method(fixture);
    const net = new Net(device);
    const adapter = injectAdapter(net, config);
    const parameters = [...adapter.parameters()];
    expect(parameters.map(([key]) => fixtureName(key)).sort()).toEqual([...truth.start.keys()].sort());
    const folder = new MemoryFolder();
    await adapter.save(folder);
    const name = [...folder.files.keys()].find((file) => file.endsWith('.safetensors')) ?? '';
    const file = await openSafetensors(memorySource(folder.bytes(name)));
    for (const [key, p] of parameters) {
      const start = startOf(truth.start, fixtureName(key));
      if (savesParameters) expect(file.tensors.get(key)?.shape, key).toEqual(start.shape);
      assign(p, start.data);
    }
    const { losses, gradients } = await tenSteps(net, adapter);
    expect(relativeError(losses, truth.losses)).toBeLessThan(2e-5);
    for (const [key, gradient] of gradients) {
      const wanted = truth.gradients.get(fixtureName(key)) ?? [];
      expect(relativeError(gradient, wanted), key).toBeLessThan(2e-4);
    }
    expect(relativeError(await net.readLogits(), truth.logits)).toBeLessThan(1e-3);
    net.dispose();
  });

  it('over f16 and NF4 the gradients are those over the numbers that these hold', async () => {
    const results = new Map<string, { loss: number; gradients: Map<string, Float64Array> }>();
    for (const storage of ['f32', 'f16', 'nf4', 'restored'] as const) {
      const net = new Net(device, storage);
      const adapter = injectAdapter(net, config);
      // The same values whatever the base: what starts from its numbers would differ.
      for (const [key, p] of adapter.parameters()) {
        const { data } = startOf(fixtures.method(fixture).start, fixtureName(key));
        const noise = values(key, p.size);
        assign(
          p,
          data.map((v, i) => v + 0.3 * noise[i]),
        );
      }
      results.set(storage, await gradientsOf(net, [...adapter.parameters()]));
      net.dispose();
    }
    for (const [storage, truth, tolerance] of [
      ['f16', 'f32', 2e-2],
      ['nf4', 'restored', 1e-5],
    ] as const) {
      const [a, b] = [results.get(storage), results.get(truth)];
      expect(relativeError([a?.loss ?? NaN], [b?.loss ?? NaN])).toBeLessThan(tolerance);
      for (const [key, gradient] of a?.gradients ?? []) {
        expect(relativeError(gradient, b?.gradients.get(key) ?? []), `${storage} ${key}`).toBeLessThan(tolerance);
      }
    }
  });

  it('is saved and loaded, the second file equal to the first byte for byte; a file cut short leaves nothing', async () => {
    const net = new Net(device);
    const adapter = injectAdapter(net, config);
    await move(adapter);
    const logits = await net.readLogits();
    const folder = new MemoryFolder();
    await adapter.save(folder, { baseModelName: 'some/base' });
    adapter.remove();
    const live = device.stats().liveBytes;
    const plain = await net.readLogits();
    const cut = new MemoryFolder();
    for (const [name, bytes] of folder.files) {
      // The last numbers are missing.
      cut.files.set(name, name.endsWith('.safetensors') ? bytes.subarray(0, -4) : bytes);
    }
    await expect(loadAdapter(net, cut)).rejects.toThrow('safetensors');
    expect(device.stats().liveBytes).toBe(live);
    expect(await net.readLogits()).toEqual(plain);
    const again = await loadAdapter(net, folder);
    expect(await net.readLogits()).toEqual(logits);
    const second = new MemoryFolder();
    await again.save(second);
    expect([...second.files.keys()].sort()).toEqual([...folder.files.keys()].sort());
    for (const [name, bytes] of folder.files) {
      expect(Buffer.compare(second.bytes(name), bytes), name).toBe(0);
    }
    net.dispose();
  });

  if (!mergeable) return;

  it.each([
    ['f32', 2e-6],
    ['f16', 5e-3],
    ['nf4', 2e-3],
  ] as const)('merges over %s, and back exactly', async (storage, tolerance) => {
    const net = new Net(device, storage);
    const own = device.stats().liveBytes;
    const adapter = injectAdapter(net, config);
    const before = await net.readLogits();
    await move(adapter);
    const apart = await net.readLogits();
    adapter.merge();
    const merged = await net.readLogits();
    expect(relativeError(merged, apart)).toBeLessThan(tolerance);
    expect(relativeError(apart, before)).toBeGreaterThan(20 * tolerance);
    expect([...(await adapter.updateNorms()).values()].every((norm) => norm > 0)).toBe(true);
    adapter.unmerge();
    expect(await net.readLogits()).toEqual(apart);
    adapter.mergeAndUnload();
    expect(await net.readLogits()).toEqual(merged);
    if (storage !== 'nf4') expect(device.stats().liveBytes).toBe(own);
    net.dispose();
  });
}
