/** One device per test file. */
import { type Device, openDevice } from '@lorikeet/tensor';
import { afterAll } from 'vitest';

let shared: Promise<Device> | undefined;

/** The device variant that the environment asks for: the same suite runs on all of them. */
export function testVariant(): { limits: 'adapter' | 'default'; shaderF16: boolean; subgroups: boolean } {
  const { LORIKEET_TEST_LIMITS: limits, LORIKEET_TEST_F16: f16, LORIKEET_TEST_SUBGROUPS: subgroups } = process.env;
  return {
    limits: limits === 'default' ? 'default' : 'adapter',
    shaderF16: f16 !== 'off',
    subgroups: subgroups !== 'off',
  };
}

/**
 * The device of a test file, made at the first call; new buffers are filled with NaN, so a kernel that writes too little
 * is seen. Call it at the top of the file (`const device = await testDevice()`), not inside a test: it registers an
 * `afterAll` that waits for the work, throws what the device had to say late, and ends it.
 *
 * Environment: `LORIKEET_TEST_LIMITS=default` keeps WebGPU's guaranteed limits, `LORIKEET_TEST_F16=off` and
 * `LORIKEET_TEST_SUBGROUPS=off` leave those features off.
 */
export function testDevice(): Promise<Device> {
  if (shared === undefined) {
    const opening = openDevice({ ...testVariant(), poison: true });
    shared = opening;
    afterAll(async () => {
      const device = await opening;
      await device.idle();
      device.destroy();
    });
  }
  return shared;
}
