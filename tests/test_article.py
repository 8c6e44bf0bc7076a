"The article's cells with today's argument names, and nothing of them changed but that."
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from alpaca_ft import LLMSampleCB, create_prompt, create_prompt_no_answer, load_alpaca, param_count

STEPS = 6


@pytest.fixture
def offline(here, monkeypatch):
    "W&B keeps to this folder."
    for k in ('WANDB_DATA_DIR', 'WANDB_CACHE_DIR', 'WANDB_CONFIG_DIR'):
        monkeypatch.setenv(k, str(here/k))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    import wandb
    wandb.teardown()  # an earlier test of this process may have had W&B read its settings; they are read again
    return here


def article_rows(here):
    "Cell 1, behind the download."
    from datasets import load_dataset
    artifact_dir = here/'artifact'
    artifact_dir.mkdir()
    rows = list(load_alpaca()['train'])
    for name, part in dict(train=rows[:40], eval=rows[40:48]).items():
        (artifact_dir/f'alpaca_gpt4_{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in part))
    alpaca_ds = load_dataset("json", data_dir=str(artifact_dir), cache_dir=str(here/'cache'))
    assert alpaca_ds['train'][:] == load_alpaca(artifact_dir)['train'][:]
    return alpaca_ds["train"], alpaca_ds["test"]


def article_model(tiny):
    "Cells 3 and 4."
    model = AutoModelForCausalLM.from_pretrained(tiny, device_map="cpu", dtype=torch.float32)
    n_freeze = 2
    for param in model.parameters():
        param.requires_grad = False
    for param in model.lm_head.parameters():
        param.requires_grad = True
    for param in model.model.layers[n_freeze:].parameters():
        param.requires_grad = True
    model.model.embed_tokens.weight.requires_grad_(False)
    total, trainable = param_count(model)
    assert 0 < trainable < total
    return model


def article_arguments(here):
    "Cell 5, with today's names."
    return SFTConfig(
        output_dir=str(here/'out'), per_device_train_batch_size=4, per_device_eval_batch_size=1, bf16=False,
        use_cpu=True, learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=STEPS // 10, max_steps=STEPS,
        gradient_accumulation_steps=1, activation_checkpointing=True, eval_strategy="steps", eval_steps=STEPS // 3,
        logging_strategy="steps", logging_steps=1, save_strategy="no", packing=True, max_length=256)


def test_article(offline, tiny):
    import wandb
    wandb.init(project="alpaca_ft", tags=["hf_sft"])
    train_dataset, eval_dataset = article_rows(offline)
    trainer = SFTTrainer(article_model(tiny), train_dataset=train_dataset, eval_dataset=eval_dataset,
                         args=article_arguments(offline), formatting_func=create_prompt,
                         processing_class=AutoTokenizer.from_pretrained(tiny))
    test_dataset = eval_dataset.map(create_prompt_no_answer)
    wandb_callback = LLMSampleCB(trainer, test_dataset, num_samples=3, max_new_tokens=8)
    trainer.add_callback(wandb_callback)
    trainer.train()
    wandb.finish()
    assert sorted({r['step'] for r in wandb_callback.rows}) == [0, 2, 4, 6] and len(wandb_callback.rows) == 12
    assert list((offline/'wandb').rglob('sample_predictions*.table.json'))
