/** Where WebGPU comes from in a browser: `navigator.gpu`. */

/** The browser's GPU object. @throws when the browser has no WebGPU. */
export async function openGpu(): Promise<GPU> {
  const navigator: { gpu?: GPU } | undefined = Reflect.get(globalThis, 'navigator');
  if (navigator?.gpu === undefined) {
    throw new Error('this browser has no WebGPU (navigator.gpu is missing); use a recent Chrome, Edge, Firefox or Safari over https or localhost');
  }
  return navigator.gpu;
}
