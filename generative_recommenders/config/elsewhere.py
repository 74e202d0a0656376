"""Parameters of the HSTU authors' functions that are no settings here, and what takes their place."""

from __future__ import annotations

ELSEWHERE = {
    "train_fn.restore_from_ckpt": "give --resume --run_dir=RUN, or --mode=import --meta_checkpoint=FILE for a "
    "checkpoint of the authors' program",
    "train_fn.rank": "processes are numbered by the launcher: give --num_processes, torchrun or srun",
    "train_fn.world_size": "give --num_processes, torchrun or srun",
    "train_fn.master_port": "give --master_port",
    "get_sequential_encoder.module_type": "bind train_fn.main_module",
    "get_sequential_encoder.max_sequence_length": "bind train_fn.max_sequence_length",
    "get_sequential_encoder.max_output_length": "bind train_fn.gr_output_length, which is one less",
    "get_sequential_encoder.embedding_module": "bind train_fn.embedding_module_type",
    "get_sequential_encoder.interaction_module": "bind train_fn.interaction_module_type",
    "get_sequential_encoder.input_preproc_module": "bind train_fn.input_preprocessor",
    "get_sequential_encoder.output_postproc_module": "bind train_fn.user_embedding_norm",
    "get_sequential_encoder.verbose": "--dry_run prints the model",
    "get_similarity_function.module_type": "bind train_fn.interaction_module_type",
    "get_similarity_function.query_embedding_dim": "bind train_fn.item_embedding_dim",
    "get_similarity_function.item_embedding_dim": "bind train_fn.item_embedding_dim",
    "create_mol_interaction_module.query_embedding_dim": "bind train_fn.item_embedding_dim",
    "create_mol_interaction_module.item_embedding_dim": "bind train_fn.item_embedding_dim",
    "create_data_loader.batch_size": "bind train_fn.local_batch_size and train_fn.eval_batch_size",
    "create_data_loader.shuffle": "training batches are shuffled by train_fn.random_seed, those of evaluation are not",
    "create_data_loader.world_size": "give --num_processes, torchrun or srun",
    "create_data_loader.rank": "processes are numbered by the launcher: give --num_processes, torchrun or srun",
    "create_data_loader.drop_last": "no batch is dropped",
}
"""Published name -> what to do instead. None, "" and False, which ask for nothing, are accepted."""
