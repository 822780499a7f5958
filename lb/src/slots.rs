//! The slot table: exact weighted quotas and fallbacks.
