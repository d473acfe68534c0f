import { parseJsonObject } from '@lorikeet/tensor';
import { MemoryFolder, testDevice } from '@lorikeet/testing';
import { describe, expect, it } from 'vitest';
import { checkMethod, move } from '../../test/method-checks.js';
import { MethodNet } from '../../test/method-net.js';
import { injectAdapter } from '../create-adapter.js';
import { loraConfig } from '../format.js';
import { matchModules } from '../targets.js';
import { bottleneck, bottleneckConfig } from './bottleneck.js';
import { ia3, ia3Config } from './ia3.js';
import { lnTuning, lnTuningConfig } from './ln-tuning.js';
import './lora.js';

const device = await testDevice();
const projections = ['up_proj', 'down_proj'];
const low = { r: 4, lora_alpha: 8, target_modules: projections };

describe('LoRA', () => {
  checkMethod(device, { fixture: 'lora', config: loraConfig(low) });
});

describe('rsLoRA', () => {
  checkMethod(device, { fixture: 'rslora', config: loraConfig({ ...low, use_rslora: true }) });
});

describe('LoRA beside a head that is trained whole', () => {
  checkMethod(device, { fixture: 'modules_to_save', config: loraConfig({ ...low, modules_to_save: ['lm_head'] }) });
});

describe('LoRA beside rows of tokens', () => {
  const trainable_token_indices = { embed_tokens: [3, 9], lm_head: [3, 9] };
  checkMethod(device, { fixture: 'token_rows', config: loraConfig({ ...low, trainable_token_indices }) });
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
    const folder = new MemoryFolder();
    await adapter.save(folder, { baseModelName: 'some/base' });
    expect([...folder.files.keys()].sort()).toEqual(['adapter.safetensors', 'adapter_config.json']);
    expect([...adapter.parameters()].slice(0, 4).map(([key, { shape }]) => [key, shape])).toEqual([
      ['layers.0.output_adapters.adapters.task.adapter_down.0.weight', [4, 16]],
      ['layers.0.output_adapters.adapters.task.adapter_down.0.bias', [4]],
      ['layers.0.output_adapters.adapters.task.adapter_up.weight', [16, 4]],
      ['layers.0.output_adapters.adapters.task.adapter_up.bias', [16]],
    ]);
    const file: unknown = JSON.parse(folder.text('adapter_config.json'));
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

describe('adapter_config.json', () => {
  const shared = ['auto_mapping', 'base_model_name_or_path', 'exclude_modules', 'inference_mode', 'modules_to_save'];
  const rest = ['peft_type', 'revision', 'target_modules', 'task_type'];

  it.each([
    [ia3, ia3Config(), [...shared, ...rest, 'fan_in_fan_out', 'feedforward_modules', 'init_ia3_weights']],
    [lnTuning, lnTuningConfig(), [...shared, ...rest]],
  ])('has the keys of PEFT 0.15, and keeps those that it does not know', (method, config, keys) => {
    const text = method.serializeConfig(config, { hiddenSize: 16 });
    const object = parseJsonObject(text, 'adapter_config.json');
    expect(Object.keys(object)).toEqual([...keys].sort());
    expect(object['inference_mode']).toBe(true);
    const foreign = JSON.stringify({ ...object, peft_version: '0.18.0' });
    const again = method.serializeConfig(method.parseConfig(foreign, 'file'), { hiddenSize: 16 });
    expect(parseJsonObject(again, 'file')).toEqual({ ...object, peft_version: '0.18.0' });
    expect(() => method.parseConfig('{"peft_type": "OTHER"}', 'file')).toThrow('peft_type is "OTHER"');
    expect(() => method.parseConfig(JSON.stringify({ ...object, target_modules: 3 }), 'file')).toThrow(
      'target_modules',
    );
  });

  it('(IA)^3 of a Mistral without names takes keys, values and the last layer of the MLP', () => {
    const config = ia3Config();
    const names = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'];
    const infos = names.map((path) => ({ path, kind: 'linear' as const }));
    const { defaultTargets } = ia3;
    expect(matchModules(config, infos, defaultTargets === undefined ? {} : { defaults: defaultTargets })).toEqual(
      infos.filter(({ path }) => ['k_proj', 'v_proj', 'down_proj'].includes(path)),
    );
    expect(() => ia3Config({ fan_in_fan_out: true })).toThrow('fan_in_fan_out is true');
  });
});
