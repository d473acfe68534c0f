/**
 * The kernels that are fastest on this machine's device: measured once, kept in the user's cache, taken by every command.
 * The candidates give the same bits, so a choice never changes a result.
 */
import { mkdir, readFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { type Device, type GemmTuning, gemmTiers, setGemmChoice, tuneGemm } from '@lorikeet/tensor';
import { z } from 'zod';
import { version } from './version.js';
import { writeJsonAtomic } from './write.js';

type Environment = Readonly<Record<string, string | undefined>>;

const tier = z.enum(['broadcast', 'direct', 'shared64', 'shared128']);
const rates = z.partialRecord(tier, z.number());
const tuning = z.object({
  large: tier,
  small: tier,
  sliced: tier,
  gflops: z.object({ large: rates, small: rates, sliced: rates }),
});
const cacheFile = z.record(z.string(), tuning);

/** Where the choices of all devices are kept. */
export function tuningFile(env: Environment = process.env): string {
  return join(env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'lorikeet', 'kernels.json');
}

/** Another driver, or another version of the kernels, is another device. */
function keyOf({ info }: Device): string {
  return [version(), info.vendor, info.architecture, info.device, info.description, info.subgroupSize].join(' | ');
}

async function readAll(path: string): Promise<Record<string, GemmTuning>> {
  try {
    return cacheFile.parse(JSON.parse(await readFile(path, 'utf8')));
  } catch {
    // It is a cache: what is missing or broken is measured again.
    return {};
  }
}

/** The choice that was measured on this device before, if any. */
export async function readTuning(device: Device, env?: Environment): Promise<GemmTuning | undefined> {
  const found = (await readAll(tuningFile(env)))[keyOf(device)];
  const there = gemmTiers(device);
  return found !== undefined && [found.large, found.small, found.sliced].every((name) => there.includes(name))
    ? found
    : undefined;
}

/** Measures, keeps and sets the choice; some 2 s on a GPU, and more on a software device, which compiles slowly. */
export async function tune(device: Device, env?: Environment): Promise<GemmTuning> {
  const found = await tuneGemm(device);
  setGemmChoice(device, found);
  const path = tuningFile(env);
  try {
    await mkdir(dirname(path), { recursive: true });
    await writeJsonAtomic(path, { ...(await readAll(path)), [keyOf(device)]: found });
  } catch {
    // Where nothing can be kept, the next command measures again.
  }
  return found;
}

/** Sets what was measured before; on a GPU that is new here, measures first. */
export async function applyTuning(device: Device, env?: Environment): Promise<void> {
  const known = await readTuning(device, env);
  if (known !== undefined) setGemmChoice(device, known);
  else if (!device.info.fallback) await tune(device, env);
}
