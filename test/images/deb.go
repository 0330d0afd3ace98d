// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// download answers the file of every package, fetching all of them when one is
// missing from dir: packages of different builds do not fit together.
func download(dir string, packages []string) (map[string]string, error) {
	if debs, err := cached(dir, packages); err == nil {
		return debs, nil
	}
	old, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	for _, file := range old {
		if err := os.Remove(file); err != nil {
			return nil, err
		}
	}
	cmd := exec.Command("apt-get", append([]string{"download", "-q"}, packages...)...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("apt-get download (needs Debian 12 and a recent apt-get update): %w\n%s", err, out)
	}
	return cached(dir, packages)
}

func cached(dir string, packages []string) (map[string]string, error) {
	debs := make(map[string]string)
	for _, name := range packages {
		files, err := filepath.Glob(filepath.Join(dir, name+"_*.deb"))
		if err != nil {
			return nil, err
		}
		if len(files) != 1 {
			return nil, fmt.Errorf("package %s: %d files in %s, want 1", name, len(files), dir)
		}
		debs[name] = files[0]
	}
	return debs, nil
}

// addDeb adds the files of a package whose merged-usr names keep says yes to,
// with the directories above them.
func (t *tree) addDeb(deb string, keep func(name string) bool) error {
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	readErr := t.addTar(stdout, keep)
	if readErr != nil {
		stdout.Close() // dpkg-deb must not wait for a reader that has left
	}
	if err := cmd.Wait(); err != nil && readErr == nil {
		readErr = fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	if readErr != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(deb), readErr)
	}
	return nil
}

func (t *tree) addTar(r io.Reader, keep func(name string) bool) error {
	archive := tar.NewReader(r)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			// Read on to the end of the padding, or the writer gets a broken pipe.
			_, err = io.Copy(io.Discard, r)
			return err
		}
		if err != nil {
			return err
		}
		name := mergedUsr(header.Name)
		if header.Typeflag == tar.TypeDir || !keep(name) {
			continue
		}
		e := &entry{mode: header.Mode & 0o7777, uid: header.Uid, gid: header.Gid}
		switch header.Typeflag {
		case tar.TypeReg:
			e.kind = tar.TypeReg
			if e.body, err = io.ReadAll(archive); err != nil {
				return err
			}
		case tar.TypeSymlink:
			e.kind, e.target = tar.TypeSymlink, header.Linkname
		default:
			return fmt.Errorf("%s: tar type %q is not expected in a package", name, header.Typeflag)
		}
		t.add(name, e)
	}
}

// mergedUsr turns ./lib/x into usr/lib/x: in the image /lib, /bin, /sbin and
// /lib64 are links into /usr, and a layer must not replace them by directories.
func mergedUsr(name string) string {
	name = strings.Trim(strings.TrimPrefix(name, "."), "/")
	first, _, _ := strings.Cut(name, "/")
	if slices.Contains([]string{"bin", "sbin", "lib", "lib64"}, first) {
		return "usr/" + name
	}
	return name
}
