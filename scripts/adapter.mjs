// Prints the WebGPU adapter that Lorikeet would use. Exit code 0: there is one; 3: there is none; 1: the `webgpu` package does not load.
import { create } from 'webgpu';

const gpu = create([]);
const adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' });
if (adapter) {
  const { vendor, architecture, device, description, isFallbackAdapter } = adapter.info;
  const name = description || device || [vendor, architecture].filter(Boolean).join(' ') || 'unnamed';
  console.log(isFallbackAdapter ? `${name} (software)` : name);
} else {
  process.exitCode = 3;
}
// Dawn must outlive everything that was made from it.
globalThis.lorikeetGpu = gpu;
