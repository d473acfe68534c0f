import { testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { checkMethod, move } from '../../test/method-checks.js';
import { MethodNet } from '../../test/method-net.js';
import { memoryFolder } from '../../test/tiny-model.js';
import { injectAdapter } from '../adapter.js';
import { loraConfig } from '../format.js';
import { bottleneck, bottleneckConfig } from './bottleneck.js';
import { ia3Config } from './ia3.js';
import { lnTuningConfig } from './ln-tuning.js';
import './lora.js';

const device = await testDevice();
const projections = ['up_proj', 'down_proj'];
const low = { r: 4, lora_alpha: 8, target_modules: projections };

describe('LoRA', () => {
  checkMethod(device, { fixture: 'lora', config: loraConfig(low) });
});

describe('LoRA beside a head that is trained whole', () => {
  checkMethod(device, { fixture: 'modules_to_save', config: loraConfig({ ...low, modules_to_save: ['lm_head'] }) });
});

describe('DoRA', () => {
  checkMethod(device, { fixture: 'dora', config: loraConfig({ ...low, use_dora: true }) });
});

describe('(IA)^3', () => {
  checkMethod(device, { fixture: 'ia3', config: ia3Config({ target_modules: projections }) });
});

describe('norm tuning', () => {
  checkMethod(device, { fixture: 'ln_tuning', config: lnTuningConfig({ target_modules: ['norm'] }) });
});

describe.each([
  ['houlsby', 4],
  ['pfeiffer', 4],
  ['parallel', 4],
] as const)('bottleneck adapters, %s', (kind, reduction_factor) => {
  // The net has one sub-block a layer, and so one place.
  const config = bottleneckConfig(kind, { mh_adapter: false, reduction_factor, name: 'task' });
  checkMethod(device, {
    fixture: kind,
    config,
    fixtureName: (key) =>
      key
        .replace('output_adapters.adapters.task', 'join')
        .replace('adapter_down.0', 'down')
        .replace('adapter_up', 'up'),
    mergeable: false,
  });
});

describe('files of bottleneck adapters', () => {
  it('are all there is of them: they cannot be merged', async () => {
    const net = new MethodNet(device);
    const adapter = injectAdapter(net, bottleneckConfig('pfeiffer', { reduction_factor: 4 }));
    await move(adapter);
    const logits = await net.readLogits();
    expect(() => adapter.merge()).toThrow('no linear map and cannot be merged');
    expect(() => adapter.mergeAndUnload()).toThrow('no linear map and cannot be merged');
    expect(adapter.merged).toBe(false);
    expect(await net.readLogits()).toEqual(logits);
    net.dispose();
  });

  it('have the names and settings of AdapterHub', async () => {
    const net = new MethodNet(device);
    const config = bottleneckConfig('pfeiffer', { reduction_factor: 4, name: 'task' });
    const adapter = injectAdapter(net, config);
    const folder = memoryFolder();
    await adapter.save(folder, { baseModelName: 'some/base' });
    expect([...folder.files.keys()].sort()).toEqual(['adapter.safetensors', 'adapter_config.json']);
    expect([...adapter.parameters()].slice(0, 4).map(([key, { shape }]) => [key, shape])).toEqual([
      ['layers.0.output_adapters.adapters.task.adapter_down.0.weight', [4, 16]],
      ['layers.0.output_adapters.adapters.task.adapter_down.0.bias', [4]],
      ['layers.0.output_adapters.adapters.task.adapter_up.weight', [16, 4]],
      ['layers.0.output_adapters.adapters.task.adapter_up.bias', [16]],
    ]);
    const file: unknown = JSON.parse(new TextDecoder().decode(folder.files.get('adapter_config.json')));
    expect(file).toMatchObject({
      config: {
        mh_adapter: false,
        output_adapter: true,
        non_linearity: 'relu',
        reduction_factor: 4,
        original_ln_before: true,
      },
      hidden_size: 16,
      model_name: 'some/base',
      name: 'task',
    });
    net.dispose();
  });

  it.each([
    [{ use_gating: true }, 'use_gating is true, which is not supported'],
    [{ leave_out: [0] }, 'leave_out names layers'],
    [{ reduction_factor: { default: 4 } }, 'reduction_factor must be'],
    [{ non_linearity: 'gelu' }, 'non_linearity must be'],
  ])('are refused where they ask for more: %j', (settings, message) => {
    expect(() => bottleneck.parseConfig(JSON.stringify({ config: settings }), 'adapter_config.json')).toThrow(message);
  });
});
