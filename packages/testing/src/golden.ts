/** Golden data that lies beside the repository, not in it. */
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openSafetensorsFile } from '@lorikeet/tensor/node';
import type { Array64 } from './float64.js';

/**
 * The folder of shared test data: `LORIKEET_SHARED`, or `../shared` beside the repository. Undefined where there is none;
 * tests then skip, and their name says so.
 */
export function sharedDir(): string | undefined {
  const root = fileURLToPath(new URL('../../../', import.meta.url));
  const folder = process.env.LORIKEET_SHARED ?? resolve(root, '..', 'shared');
  return existsSync(folder) ? folder : undefined;
}

/** All tensors of a safetensors file as doubles (64-bit integers must fit). */
export async function readGolden(path: string): Promise<Record<string, Array64>> {
  const file = await openSafetensorsFile(path);
  try {
    const out: Record<string, Array64> = {};
    for (const [name, { dtype, shape }] of file.tensors) {
      if (dtype === 'F32' || dtype === 'F16' || dtype === 'BF16') {
        out[name] = { shape, data: Float64Array.from(await file.readFloats(name)) };
        continue;
      }
      const bytes = (await file.read(name)).slice().buffer;
      if (dtype === 'F64') out[name] = { shape, data: new Float64Array(bytes) };
      else if (dtype === 'I32') out[name] = { shape, data: Float64Array.from(new Int32Array(bytes)) };
      else if (dtype === 'I64') out[name] = { shape, data: Float64Array.from(new BigInt64Array(bytes), Number) };
      else if (dtype === 'U8' || dtype === 'BOOL')
        out[name] = { shape, data: Float64Array.from(new Uint8Array(bytes)) };
      else throw new Error(`${path}: tensor ${name} is ${dtype}, which readGolden does not read`);
    }
    return out;
  } finally {
    await file.close();
  }
}
