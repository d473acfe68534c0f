/** Where WebGPU comes from in Node: Dawn through the npm package `webgpu`. */

/** Quick polls after each question to the device; then the pauses begin. */
const quickPolls = 60;
/** Longest pause between two polls, in ms. */
const longestPause = 10;
let polls = 0;
let asked = 0;

/** Tells the polling that an answer of the device is awaited from now on. */
export function expectAnswer(): void {
  polls = 0;
  asked = performance.now();
}

/**
 * Dawn polls with `setImmediate` as long as a promise of its own is pending, which burns a whole core: half of a
 * two-core machine whose other half runs the kernels. After some quick polls its callbacks wait for a timer instead: 1 ms,
 * and longer the longer the answer takes, so that it comes about 1.5 % late at most. Only native callbacks (Dawn's) are
 * slowed; everybody else's `setImmediate` is untouched.
 */
function tamePolling(): void {
  const immediate = globalThis.setImmediate;
  const native = /\[native code\]/;
  const isNative = new WeakMap<object, boolean>();
  const tamed = (callback: (...args: unknown[]) => void, ...args: unknown[]): unknown => {
    let slow = isNative.get(callback);
    if (slow === undefined) {
      slow = native.test(Function.prototype.toString.call(callback));
      isNative.set(callback, slow);
    }
    if (!slow || polls++ < quickPolls) return immediate(callback, ...args);
    const pause = Math.min(longestPause, Math.max(1, (performance.now() - asked) / 64));
    return setTimeout(callback, pause, ...args);
  };
  globalThis.setImmediate = Object.assign(tamed, immediate) as typeof setImmediate;
}

// Dawn dies (use after free) when the object that create() returned is collected while a device lives.
let gpu: GPU | undefined;

/** The process's one Dawn instance. f16 on NVIDIA under Vulkan is behind a toggle there, which is set. */
export async function openGpu(): Promise<GPU> {
  if (gpu === undefined) {
    let dawn: typeof import('webgpu');
    try {
      dawn = await import('webgpu');
    } catch (cause) {
      throw new Error(
        'the npm package "webgpu" (0.6.2 or later) is needed to use WebGPU in Node; install it beside @lorikeet/tensor',
        { cause },
      );
    }
    tamePolling();
    gpu = dawn.create(['enable-dawn-features=vulkan_enable_f16_on_nvidia']);
  }
  return gpu;
}
