/** Which tier of the matrix product a device uses for which shapes. */
import type { Device } from '../device.js';
import { DeviceError } from '../errors.js';

/**
 * Ways to compute a product; all give the same bits. `broadcast`: one subgroup a workgroup, needs subgroups of one size of
 * 8, 16 or 32. `direct`: registers only. `shared64`, `shared128`: tiles of that size through workgroup memory.
 */
export type GemmTier = 'broadcast' | 'direct' | 'shared64' | 'shared128';

/**
 * Classes of shapes. `large`: at least 128 tiles of 128 by 128. `sliced`: few elements and a long K, which is summed in
 * slices. `small`: the rest.
 */
export type GemmClass = 'large' | 'small' | 'sliced';

/** A tier for each class of shapes. Plain JSON. */
export interface GemmChoice {
  readonly large: GemmTier;
  readonly small: GemmTier;
  /** `broadcast` or `direct`: the others have no kernel of this class and use the direct tier's. */
  readonly sliced: GemmTier;
}

const choices = new WeakMap<Device, GemmChoice>();

/** Tiers that can run on a device. */
export function gemmTiers(device: Device): GemmTier[] {
  const broadcast = [8, 16, 32].includes(device.info.subgroupSize);
  return broadcast ? ['broadcast', 'direct', 'shared64', 'shared128'] : ['direct', 'shared64', 'shared128'];
}

/** The tiers that a device uses: those of `setGemmChoice`, or else by what is known of the device. */
export function gemmChoice(device: Device): GemmChoice {
  const known = choices.get(device);
  if (known !== undefined) return known;
  const choice: GemmChoice =
    device.info.subgroupSize === 8
      ? { large: 'broadcast', small: 'broadcast', sliced: 'broadcast' }
      : device.info.fallback
        ? { large: 'direct', small: 'direct', sliced: 'direct' }
        : { large: 'shared128', small: 'shared64', sliced: 'direct' };
  choices.set(device, choice);
  return choice;
}

/**
 * Makes a device use these tiers from now on; no result changes by it.
 * @throws DeviceError when the device cannot run one of them
 */
export function setGemmChoice(device: Device, choice: GemmChoice): void {
  const tiers = gemmTiers(device);
  for (const kind of ['large', 'small', 'sliced'] as const) {
    if (!tiers.includes(choice[kind])) {
      throw new DeviceError(
        `setGemmChoice: ${kind} products cannot use the tier ${choice[kind]} on this device; it has ${tiers.join(', ')}`,
      );
    }
  }
  choices.set(device, choice);
}
