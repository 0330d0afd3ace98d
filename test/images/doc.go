// SPDX-License-Identifier: Apache-2.0

// Command images makes the OCI archives that the tests and the demo run:
// bulkhead.local/busybox:1 (a static busybox) and bulkhead.local/python:3
// (busybox and a Python that can speak HTTP and TLS).
//
// They are made from Debian packages without Docker and without running as
// root. It owns the packages in its cache directory and the archives; it never
// touches the host's own packages. The same package versions make the same
// bytes: entries are sorted, times are 1970, owners come from the package.
//
// An archive is written beside its place and renamed, so a crash leaves the
// old one whole.
package main
