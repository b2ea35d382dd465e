//! `casemate install` and `uninstall` on real containerds, with everything that
//! can go wrong on the way.

mod faults;
mod hard;
mod image;
mod life;
mod node;
mod pods;
mod service;
mod stepper;
mod templates;

use casemate_tests::generation::Generation;
use casemate_tests::skip::trial;
use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    let mut all = faults::trials();
    all.extend(hard::trials());
    all.extend(image::trials());
    all.extend(life::trials());
    all.extend(pods::trials());
    all.extend(service::trials());
    all.extend(templates::trials());
    for generation in Generation::ALL {
        let name = format!("install_and_back_{}", generation.tag());
        all.push(trial(&name, move || life::and_back(generation)));
    }
    all
}
