import { defineConfig } from 'vitest/config';

// Tests run the sources, never dist: the packages' exports carry this condition.
const conditions = ['@lorikeet/source', 'module', 'node', 'development|production'];

export default defineConfig({
  resolve: { conditions },
  ssr: { resolve: { conditions } },
  test: {
    include: ['{packages,apps,tools}/*/{src,test}/**/*.test.ts', 'scripts/**/*.test.ts'],
    exclude: ['**/node_modules/**', '**/dist/**'],
    pool: 'forks',
    // A software adapter uses every core by itself; more workers only wait for one another.
    maxWorkers: 2,
    // Kernels compile for seconds each where the driver's cache is cold: the limit is there to end what hangs.
    testTimeout: 300_000,
    hookTimeout: 300_000,
    teardownTimeout: 30_000,
  },
});
