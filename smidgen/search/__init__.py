"""Search: describe what you need, get the feature.

What lies in RUN/artifact of `smidgen search train` (the teacher; a sentence-transformers folder):

    features.jsonl          what was learnt for, as `smidgen.search.features` reads it
    queries.jsonl           the training queries; held_out.jsonl: those kept back
    relevance.json          {"version": 1, "lift"}: of features without example queries
    config.json, model.safetensors, tokenizer.json, modules.json, 1_Pooling/, 2_Normalize/ ...

What lies in RUN/artifact of `smidgen search distill`, which a device reads with numpy, tokenizers and onnxruntime (encoder.py, index.py):

    features.jsonl          order = the numbers of features in the index
    tokenizer.json          of the `tokenizers` library, the pruned vocabulary; neither pads nor truncates
    encoder.onnx            a transformer: input_ids int64 (n, length), attention_mask int64 (n, length) -> vectors float32 (n, width), of
                            length 1; ids are cut to `length` with [CLS] and [SEP] kept
    encoder.npz             instead of it, the static tier: codes int8 (vocabulary, width), scale float32 (vocabulary,); a query's vector is
                            the sum of codes[id] * scale[id] over its ids without [CLS] and [SEP], brought to length 1
    index.smi               vectors of the features, one or more each; a feature's score is their maximum (relevance.py)
    encoder.json            {"version": 1, "kind": "onnx" or "static", "width", "length", "vocabulary", "layers", "bits", "lift"}
    config.json             of the run-time part: how scores are fused, and from which score on an answer is shown
"""
