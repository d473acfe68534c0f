/** What benches share: the clock, and results that people and programs can read. */
import { appendFileSync } from 'node:fs';
import type { Device } from '@lorikeet/tensor';
import { Bench } from 'tinybench';

/** One figure of a bench. */
export interface BenchResult {
  /** Which bench it belongs to. */
  readonly suite: string;
  /** What was measured, with its shape. */
  readonly name: string;
  readonly value: number;
  readonly unit: string;
  /** How it was measured, where that is not plain. */
  readonly note?: string;
}

/** Prints a result, and appends it as a line of JSON to the file that `LORIKEET_BENCH_OUT` names. */
export function benchResult(result: BenchResult): void {
  const { name, value, unit, note } = result;
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  console.log(
    `${name.padEnd(52)} ${value.toFixed(digits).padStart(10)} ${unit}${note === undefined ? '' : `  (${note})`}`,
  );
  const file = process.env['LORIKEET_BENCH_OUT'];
  if (file !== undefined) appendFileSync(file, `${JSON.stringify(result)}\n`);
}

/** Processor time of this process in ms, divided by the two cores that a software device uses here. */
export function processorTime(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 2000;
}

/** The clock that tells most: processor time on a software device, which other work does not disturb, else the wall clock. */
export function benchClock(device: Device): () => number {
  return device.info.fallback ? processorTime : () => performance.now();
}

/**
 * Least time in ms of one `record()`, which only records work for the device: it runs so often in a sample that waiting for
 * the device does not count. The first run, which compiles, is not measured.
 */
export async function benchTime(
  device: Device,
  record: () => void,
  options: { readonly samples?: number; readonly milliseconds?: number } = {},
): Promise<number> {
  const { samples = 5, milliseconds = 40 } = options;
  const now = benchClock(device);
  let runs = 1;
  const sample = async (): Promise<void> => {
    for (let i = 0; i < runs; i++) record();
    await device.idle();
  };
  await sample();
  for (;;) {
    const start = now();
    await sample();
    const took = now() - start;
    if (took >= milliseconds || runs >= 4096) break;
    runs = Math.ceil(runs * Math.min(8, Math.max(2, milliseconds / Math.max(took, 0.01))));
  }
  const bench = new Bench({ iterations: samples, time: 0, warmup: false, now });
  bench.add('sample', sample);
  await bench.run();
  const { result } = bench.tasks[0];
  if (result.state !== 'completed') throw new Error(`the bench ended as ${result.state}`);
  return result.latency.min / runs;
}
