"""Several fine-tuned models with MoE experts on one device, by sharing what is alike.

    plan "deltas"     a base in as many bits as the budget allows, and every model as a delta against it
    plan "owners"     a MoE expert of one model stands for that of all, the most alike first; owners take turns
    plan "medoids"    the same, but the owner is the one that is nearest to all others, weighed by use

"owners" is the plan of "QoS-Efficient Serving of Multiple Mixture-of-Expert LLMs Using Partial Runtime Reconfiguration"
(arXiv 2505.06481, section 3.1), for comparison. Every plan is written as a base and delta directories against it, which
any engine serves: in those of the last two, a shared MoE expert is the base's, and any other is stored whole.

    job        `share`, from arguments to the folders      family     the models, and how far apart they are
    deltas     the plan of that name, and its base         owners     the other two plans

Threads: everything runs on the caller's thread. Memory: as `compress` has it.
"""
