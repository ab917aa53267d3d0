"""What a model can do: catalog, parameters, prompts, content policy, pipelines and the engine that runs them.

Knows nothing of Ray, SQL or HTTP. Heavy libraries (torch, diffusers, transformers) are imported inside
`load()` functions only, so that importing a module of this package stays cheap.
"""
