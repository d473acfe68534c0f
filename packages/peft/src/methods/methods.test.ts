import { testDevice } from '@lorikeet/testing';
import { describe } from 'vitest';
import { checkMethod } from '../../test/method-checks.js';
import { loraConfig } from '../format.js';
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
