/** Versions of this program and of what it runs on. */
import { readFileSync } from 'node:fs';
import { z } from 'zod';

const packageFile = z.object({ version: z.string(), dependencies: z.record(z.string(), z.string()) });

/** The package that this file belongs to, in src and in dist. */
function ownPackage(): z.infer<typeof packageFile> {
  return packageFile.parse(JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')));
}

/** The version of the program. */
export function version(): string {
  return ownPackage().version;
}

/** What a run's results may depend on, by name. */
export function versions(): Readonly<Record<string, string>> {
  const { version: own, dependencies } = ownPackage();
  return {
    lorikeet: own,
    node: process.versions.node,
    webgpu: dependencies['webgpu'] ?? 'unknown',
    platform: `${process.platform}-${process.arch}`,
  };
}
