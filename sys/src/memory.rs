//! What a long-lived process gives back once it has started.

unsafe extern "C" {
    // Set by the linker: first byte of the image, first byte after its code.
    static __executable_start: u8;
    static etext: u8;
}

/// Unmaps code and constants that ran once (parsers, set-up) and returns free
/// heap pages: what is still needed comes back from the page cache at the next
/// touch. Hundreds of pods idle on a node; their start-up shouldn't stay mapped.
pub fn release_startup() {
    // SAFETY: malloc_trim only returns pages that hold no live allocation.
    unsafe { libc::malloc_trim(0) };
    let page = 4096usize;
    let (start, end) = (
        &raw const __executable_start as usize,
        &raw const etext as usize,
    );
    let (start, end) = (start.next_multiple_of(page), end & !(page - 1));
    if end > start {
        // SAFETY: the range is this image's own headers, constants and code:
        // private mappings of the executable's file that nobody can write
        // (relocated data lies behind etext), so that dropping pages only
        // means reading them again (madvise(2), MADV_DONTNEED).
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_program_goes_on_after_its_code_was_released() {
        let before: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
        super::release_startup();
        let after: Vec<String> = (0..1000).map(|n| format!("{n}")).collect();
        assert_eq!(before, after);
    }
}
