/** Where WebGPU comes from in a browser: `navigator.gpu`. */

/** The browser's GPU object. @throws when the browser has no WebGPU. */
export async function openGpu(): Promise<GPU> {
  const navigator: unknown = Reflect.get(globalThis, 'navigator');
  if (!hasGpu(navigator)) {
    throw new Error(
      'this browser has no WebGPU (navigator.gpu is missing); use a recent Chrome, Edge, Firefox or Safari over https or localhost',
    );
  }
  return navigator.gpu;
}

/** Node's bindings poll for answers; a browser does not. */
export function expectAnswer(): void {}

function hasGpu(navigator: unknown): navigator is { readonly gpu: GPU } {
  return typeof navigator === 'object' && navigator !== null && 'gpu' in navigator && navigator.gpu !== undefined;
}
