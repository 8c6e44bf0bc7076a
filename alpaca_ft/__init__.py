__version__ = "0.2.0.dev0"

import sys
from importlib import import_module
from types import ModuleType

# What a user needs can be imported from here; a module is loaded at the first use, so `import alpaca_ft` is quick.
_modules = dict(
    data='Refused load_alpaca split_alpaca shared_rows read_rows iter_rows row_problem clean_rows write_jsonl '
         'near_duplicates fetch_artifact cache_dir',
    checks='fingerprint Exercise',
    formats='parse_columns as_row',
    files='append_jsonl read_jsonl read_run',
    processes='processes rank is_first everyone each_does first_does',
    options='RunConfig read_config plan PRESETS',
    prompts='prompt_no_input prompt_input create_prompt create_prompt_no_answer prompt_completion tokenize prompt_ids '
            'alpaca_chat_template use_template row_prompt turns_of',
    templates='ChatTemplate',
    packing='pack truncate plot_packing PackedCollator isolation_error leakage',
    model='demo_model load_model load_tokenizer Choice apply_choice resolve_choice chosen_layers spectrum '
          'has_adapter freeze untie decoder_layers param_count compute_dtype autocast settle checkpoint_trained '
          'share cut_layers Trunk Tail memory_estimate model_shape save_model',
    manifest='Manifest compare_manifests',
    gguf_file='write_gguf modelfile',
    sampling='generate generate_all generation_config LLMSampleCB fit_prompt printable visible as_found before_after',
    trainer='sft_config make_trainer token_losses PackedLoss PackedSFTTrainer Diverged quiet',
    stream='RowStream PackedStream open_stream',
    evaluate='evaluate find_model interval judge repetition',
    prefix='States WholeModel drops_out',
    speed='Step choose_step document_attention linear_loss',
    memory='Tally moments memory_plan memory_table as_bytes fitting counted_advice',
    layers='Large large_model states_by_layer save_by_shard',
    checkpoints='Best Checkpoints checkpoints damage last_complete resume_command Failed Stopped memory_advice '
                'out_of_memory',
    tracking='Tracker wandb_mode',
    report='ReportCB write_report',
    run='train check prepare preflight Run',
    use='sample chat export merged_model model_card',
)
_where = {name: module for module, names in _modules.items() for name in names.split()}
__all__ = sorted(_where)


class _Callable(ModuleType):
    "A module with a function of its own name, such as `evaluate`: to call it is to call the function."
    def __call__(self, *args, **kw):
        return self._named()(*args, **kw)

    def _named(self):
        return vars(self)[self.__name__.rpartition('.')[2]]

    @property
    def __signature__(self):
        from inspect import signature
        return signature(self._named())


class _Package(ModuleType):
    "Python binds each imported module to its package, over a function of the same name; so such modules can be called."
    def __setattr__(self, name, value):
        if name in _where and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value)


def __getattr__(name):
    if name not in _where:
        raise AttributeError(f'module alpaca_ft has no attribute {name!r}')
    module = import_module(f'alpaca_ft.{_where[name]}')
    return module if name in _modules else getattr(module, name)


sys.modules[__name__].__class__ = _Package


def __dir__(): return sorted({*globals(), *_where})
