/** Runs a bench from the sources, as the tests do: `node packages/tensor/bench/run.mjs packages/tensor/bench/gemm.ts`. */
import { resolve } from 'node:path';
import { createViteServer } from 'vitest/node';

const file = process.argv[2];
if (file === undefined) throw new Error('which bench? give its path');
const conditions = ['@lorikeet/source', 'module', 'node'];
const server = await createViteServer({
  configFile: false,
  logLevel: 'error',
  appType: 'custom',
  server: { middlewareMode: true, hmr: false, ws: false, watch: null },
  resolve: { conditions },
  ssr: { resolve: { conditions } },
});
try {
  await server.ssrLoadModule(resolve(file));
} finally {
  await server.close();
}
process.exit();
