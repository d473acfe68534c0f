/** A browser for tests of pages and of WebGPU there. */
import { accessSync, constants } from 'node:fs';
import { delimiter, join } from 'node:path';

const names = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'];

function canRun(file: string): boolean {
  try {
    accessSync(file, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

/**
 * The Chromium of this machine: `LORIKEET_CHROMIUM`, or the first one on the `PATH`. Undefined where there is none; tests
 * then skip, and their name says so.
 * @throws Error when `LORIKEET_CHROMIUM` is no program
 */
export function chromiumPath(): string | undefined {
  const { LORIKEET_CHROMIUM: own, PATH = '' } = process.env;
  if (own === undefined || own === '') {
    const folders = PATH.split(delimiter).filter((folder) => folder !== '');
    return folders.flatMap((folder) => names.map((name) => join(folder, name))).find(canRun);
  }
  if (canRun(own)) return own;
  throw new Error(`LORIKEET_CHROMIUM is ${own}, which is no program that can be run`);
}

/**
 * Options for `chromium.launch` of playwright-core: headless, silent on the network, and with WebGPU, which is SwiftShader
 * (f32, no shader-f16) where there is no GPU.
 * @param executablePath what `chromiumPath` gives
 */
export function chromiumOptions(executablePath: string): { executablePath: string; args: string[] } {
  const args = [
    // Chromium refuses to start its sandbox as root, as which containers run.
    '--no-sandbox',
    '--enable-unsafe-webgpu',
    '--no-first-run',
    '--disable-quic',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
  ];
  return { executablePath, args };
}
