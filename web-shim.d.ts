// The packages build without the DOM library (TypeScript 6 has its own WebGPU there, which conflicts with
// @webgpu/types). These are the few DOM names that @webgpu/types needs; without the first, buffer arguments are `any`.
type BufferSource = ArrayBufferView | ArrayBuffer;
type PredefinedColorSpace = 'srgb' | 'display-p3';
