/** Where WebGPU comes from in Node: Dawn through the npm package `webgpu`. */

/**
 * Dawn polls with `setImmediate` as long as a promise of its own is pending, which burns a whole core: half of a
 * two-core machine whose other half runs the kernels. After some quick polls its callbacks wait for a 1 ms timer
 * instead. Only native callbacks (Dawn's) are slowed; everybody else's `setImmediate` is untouched.
 */
function tamePolling(): void {
  const immediate = globalThis.setImmediate;
  const native = /\[native code\]/;
  const isNative = new WeakMap<object, boolean>();
  let polls = 0;
  let last = 0;
  const tamed = (callback: (...args: unknown[]) => void, ...args: unknown[]): unknown => {
    let slow = isNative.get(callback);
    if (slow === undefined) {
      slow = native.test(Function.prototype.toString.call(callback));
      isNative.set(callback, slow);
    }
    if (!slow) return immediate(callback, ...args);
    const now = performance.now();
    if (now - last > 3) polls = 0;
    last = now;
    return polls++ < 60 ? immediate(callback, ...args) : setTimeout(callback, 1, ...args);
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
