use std::collections::BTreeMap;
use std::fs;

use super::*;

/// An object file with nothing but `.modinfo`.
fn module(depends: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let info = [b"license=GPL\0depends=", depends.as_bytes(), b"\0name=x\0"].concat();
    let (info_at, names_at) = (64, 64 + info.len());
    let headers_at = names_at + names.len();
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    for half in [1_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [0_u64, 0, headers_at as u64] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 0, 0, 64, 3, 2] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(&info);
    elf.extend(names);
    for (name, kind, at, len) in [
        (0_u32, 0_u32, 0, 0),
        (1, 1, info_at, info.len()),
        (10, 3, names_at, names.len()),
    ] {
        elf.extend(name.to_le_bytes());
        elf.extend(kind.to_le_bytes());
        for word in [0, 0, at as u64, len as u64, 0, 1, 0] {
            elf.extend(u64::to_le_bytes(word));
        }
    }
    elf
}

#[test]
fn modules_come_behind_what_they_depend_on_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("kernel/drivers");
    fs::create_dir_all(&below).unwrap();
    for (name, depends) in [
        ("a-top.ko", "b,ring"),
        ("b.ko", "ring"),
        ("ring.ko", ""),
        ("loop1.ko", "loop2"),
        ("loop2.ko", "loop1"),
        ("unwanted.ko", ""),
    ] {
        fs::write(below.join(name), module(depends)).unwrap();
    }
    let mut modules = BTreeMap::new();
    collect(dir.path(), &mut modules).unwrap();
    let order = |wanted: &[&str]| -> Vec<String> {
        let ordered = in_order(wanted, &modules).unwrap();
        ordered.into_iter().map(|(name, _)| name).collect()
    };
    assert_eq!(order(&["b", "a-top", "no_such"]), ["ring", "b", "a_top"]);
    assert_eq!(order(&["a_top"]), ["ring", "b", "a_top"]);
    assert_eq!(order(&["loop1"]), ["loop2", "loop1"]);
}

#[test]
fn damaged_modules_depend_on_nothing() {
    assert_eq!(depends(&module("x,y_z")), ["x", "y_z"]);
    assert!(depends(b"").is_empty());
    let mut cut = module("x");
    cut.truncate(80);
    assert!(depends(&cut).is_empty());
}

#[test]
fn the_meta_package_names_the_kernel() {
    let shown = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
                 Depends: linux-base, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
    let expected = Package {
        name: "linux-image-6.1.0-56-cloud-amd64".to_owned(),
        version: "6.1.192-2".to_owned(),
    };
    assert_eq!(parse(shown), Some(expected));
    assert_eq!(parse(""), None);
}
