-- name: seed_template(enhancer_model, use_case, content_mode, template_name, system_prompt, token_limit, job_type, target_model, quality, metadata)!
-- A template of the product, unless the operator has one of that name already.
INSERT INTO prompt_templates (enhancer_model, use_case, content_mode, template_name, system_prompt, token_limit, job_type,
                              target_model, quality, metadata)
VALUES (:enhancer_model, :use_case, :content_mode, :template_name, :system_prompt, :token_limit, :job_type, :target_model,
        :quality, :metadata)
ON CONFLICT (enhancer_model, use_case, content_mode, template_name) DO NOTHING;

-- name: list_templates(use_case)
SELECT template_name, use_case, content_mode, system_prompt, token_limit, job_type, target_model, quality, metadata
FROM prompt_templates WHERE is_active AND use_case = :use_case ORDER BY template_name, content_mode;

-- name: seed_negative(name, model_type, content_mode, generation_mode, negative_prompt, priority, metadata, description)!
INSERT INTO negative_prompts (name, model_type, content_mode, generation_mode, negative_prompt, priority, metadata, description)
VALUES (:name, :model_type, :content_mode, :generation_mode, :negative_prompt, :priority, :metadata, :description)
ON CONFLICT (model_type, content_mode, generation_mode, name) DO NOTHING;

-- name: list_negatives()
SELECT name, model_type, content_mode, generation_mode, negative_prompt, priority, metadata, description
FROM negative_prompts WHERE is_active ORDER BY priority DESC, name;

-- name: prompt_version()$
-- Grows with every change of templates and negative prompts.
SELECT version FROM ourvidz.prompt_version;

-- name: renew_prompts()$
-- Make every replica read templates and negative prompts anew.
UPDATE ourvidz.prompt_version SET version = version + 1, changed_at = now() RETURNING version;

-- name: enhancement_model(model_id)^
SELECT model_key, model_family, modality, is_active FROM api_models WHERE id = :model_id;

-- name: enhancement_preset(name, preset_id)^
-- By its name or its id.
SELECT preset_name, enable_qwen, enable_compel, compel_weights, qwen_settings FROM ourvidz.enhancement_presets
WHERE preset_name = :name OR id = :preset_id;
