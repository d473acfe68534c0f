/** No op without its check. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { expect, it } from 'vitest';

const folder = new URL('.', import.meta.url);
const files = readdirSync(folder).filter((name) => name.endsWith('.ts') && !name.endsWith('.test.ts'));
const ops = files.flatMap((name) => {
  const source = readFileSync(new URL(name, folder), 'utf8');
  return [...source.matchAll(/export const (\w+Op)\b/g)].map(([, op]) => ({ name, op }));
});

/** True when the test beside `file` has a call of checkOp for `op`. */
function isChecked(file: string, op: string): boolean {
  const test = new URL(file.replace(/\.ts$/, '.test.ts'), folder);
  if (!existsSync(test)) return false;
  return readFileSync(test, 'utf8')
    .split(/\bcheckOp\b/)
    .slice(1)
    .some((call) => new RegExp(`\\bop: ${op}\\b`).test(call));
}

it('finds the ops', () => {
  expect(ops.map(({ op }) => op)).toContain('addOp');
  expect(ops.length).toBeGreaterThan(15);
  expect(isChecked('add.ts', 'addOp')).toBe(true);
  expect(isChecked('add.ts', 'missingOp')).toBe(false);
  expect(isChecked('missing.ts', 'missingOp')).toBe(false);
});

it.each(ops)('$op of ops/$name is checked by checkOp in the test beside it', ({ name, op }) => {
  expect(isChecked(name, op)).toBe(true);
});
