/** What the device reaches at most. `node packages/tensor/bench/run.mjs packages/tensor/bench/device.ts` */
import { measurePeak, openDevice } from '@lorikeet/tensor';
import { benchClock, benchResult } from '@lorikeet/testing';

const device = await openDevice();
const peak = await measurePeak(device, { now: benchClock(device) });
const suite = 'device';
const note = device.info.description || device.info.device;
benchResult({ suite, name: 'fma in f32 registers', value: peak.gflops, unit: 'GFLOP/s', note });
benchResult({
  suite,
  name: 'copy by a kernel',
  value: peak.gigabytesPerSecond,
  unit: 'GB/s',
  note: device.info.fallback ? 'processor time' : 'wall clock',
});
