__version__ = "0.1.0"

# What a user needs can be imported from here; the module is loaded at the first use, so that `import alpaca_ft` is quick.
_modules = dict(
    data='Refused load_alpaca split_alpaca shared_rows read_rows iter_rows row_problem clean_rows write_jsonl fetch_artifact cache_dir',
    prompts='prompt_no_input prompt_input create_prompt create_prompt_no_answer prompt_completion tokenize alpaca_chat_template',
    packing='pack truncate plot_packing PackedCollator isolation_error leakage',
    model='demo_model load_model load_tokenizer freeze untie decoder_layers param_count compute_dtype autocast checkpoint_trained memory_estimate model_shape save_model',
    sampling='generate generate_all generation_config LLMSampleCB fit_prompt printable append_jsonl as_found before_after',
    trainer='RunConfig read_config sft_config make_trainer plan token_losses Diverged',
    run='train check prepare preflight Run Plugin',
    checkpoints='Checkpoints checkpoints damage last_complete resume_command',
    faults='Faults Failed memory_advice out_of_memory',
    speed='Speed isolated document_attention linear_loss',
    prefix='PrefixCache prefix_states tail',
    tracking='Tracking wandb_mode',
    report='Report write_report read_run visible',
    evaluate='evaluate find_model interval judge repetition',
    use='sample chat export model_card',
)
_where = {name: module for module, names in _modules.items() for name in names.split()}
__all__ = sorted(_where)


def __getattr__(name):
    from importlib import import_module
    if name in _where: return getattr(import_module(f'alpaca_ft.{_where[name]}'), name)
    raise AttributeError(f'module alpaca_ft has no attribute {name!r}')


def __dir__(): return sorted({*globals(), *_where})
