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
